"""Which sample comes when: a pure function of the step."""
