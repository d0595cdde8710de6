"""The command line of the report."""

from absl import flags

from fpnas_keras import cli, report

FLAGS = flags.FLAGS
flags.DEFINE_string(
    "search_dir",
    None,
    "Run directory of a search, finished or not; report.html and report/ are written into it.",
    required=True,
)


def main() -> None:
    """Writes the report of the run directory that the flag names."""
    print(report.write(FLAGS.search_dir))


if __name__ == "__main__":
    cli.run(main)
