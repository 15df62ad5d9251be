"""Write the report from the records of a run."""

from __future__ import annotations

from nirvana_deploy.output import stage
from nirvana_deploy.output.layout import REPORT_HTML, REPORT_MARKDOWN
from nirvana_deploy.output.run import Run
from nirvana_deploy.output.stage import Stage
from nirvana_deploy.report.report import write_report


def report(run: Run) -> Stage:
    """Rewrite the reports from the run's records; cheap, so never skipped."""

    def work() -> None:
        write_report(run.out, progress=run.progress)

    return Stage(stage.REPORT, needs=(), makes=(REPORT_MARKDOWN, REPORT_HTML), work=work, always=True)
