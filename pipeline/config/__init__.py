"""The configuration: types, schema, loading, validation, comparison."""
