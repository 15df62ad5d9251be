"""Write the report from the records of a run."""

from __future__ import annotations

from nirvana_deploy.output import stage
from nirvana_deploy.output.layout import REPORT_HTML, REPORT_MARKDOWN
from nirvana_deploy.output.records import read_records
from nirvana_deploy.output.run import Run
from nirvana_deploy.output.stage import Stage
from nirvana_deploy.report.cards.folders import write_cards
from nirvana_deploy.report.report import write_report
from nirvana_deploy.report.verdict import Verdict, verdict


def report(run: Run) -> Stage:
    """Rewrite reports and cards from the run's records; cheap, so never skipped. Its result is the verdict.

    Cards lie in the folders of other stages and belong to none: no manifest lists them.
    """

    def work() -> Verdict:
        write_report(run.out, progress=run.progress)
        write_cards(run.out, progress=run.progress)
        return verdict(read_records(run.out))

    return Stage(stage.REPORT, needs=(), makes=(REPORT_MARKDOWN, REPORT_HTML), work=work, always=True)
