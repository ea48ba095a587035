"""`python -m mlxvlm`: the same as `mlxvlm`."""

from mlxvlm.cli.main import main

if __name__ == "__main__":
    main()
