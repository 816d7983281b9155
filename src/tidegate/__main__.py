# SPDX-License-Identifier: Apache-2.0
"""`python -m tidegate`: the command line."""

from tidegate.cli import main

if __name__ == "__main__":
    main()
