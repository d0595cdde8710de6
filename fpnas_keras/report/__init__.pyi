from .writer import write_report as write_report
