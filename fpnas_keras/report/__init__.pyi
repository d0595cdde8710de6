from .writer import write_report
