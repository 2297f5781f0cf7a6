"""``python -m launch.cli``: the command ``fovea`` for launchers that start modules."""

from launch.cli.main import run

if __name__ == "__main__":
    run()
