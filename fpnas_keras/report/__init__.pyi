from .failures import failure_as_warning as failure_as_warning
from .writer import write_report as write_report
