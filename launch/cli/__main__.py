"""``python -m launch.cli``: the command ``fovea`` for launchers that start modules."""

from launch.cli.main import main

if __name__ == "__main__":
    main()
