"""One comparison of several finished runs."""

from tttjax.report.entries import Entry
from tttjax.report.make import make_report
from tttjax.report.results import Report, SystemResult

__all__ = ["Entry", "Report", "SystemResult", "make_report"]
