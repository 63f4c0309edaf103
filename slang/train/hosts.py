"""mlx.launch, for HOSTFILE: it ends with 1 where a machine's program failed, mlx.launch with 0.

Run as: python -m slang.train.hosts hosts.json python -m slang.train ...
"""

if __name__ == "__main__":
    from slang.errors import program

    program("slang.train.hosts")

import sys

from mlx._distributed_utils import launch

from slang.errors import UserError, first_line


def main() -> int:
    hostfile = sys.argv[1]
    try:
        hosts = launch.Hostfile.from_file(hostfile).hosts
    except ValueError as error:
        remedy = "mlx.distributed_config writes one"
        raise UserError(f"{hostfile}: {first_line(error)}; {remedy}") from None
    if len(hosts) < 2:
        raise UserError(f"{hostfile}: one machine; name two or more, or leave HOSTFILE out")
    warnings = []
    warn = launch.log_warning

    def noted(message: str) -> None:
        warnings.append(message)
        warn(message)

    launch.log_warning = noted  # it tells of failures in no other way
    sys.argv.insert(1, "--hostfile")
    launch.main()
    return 1 if warnings else 0
