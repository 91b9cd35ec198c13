"""What goes otherwise than configured, each text once."""

from rich.console import Console

from nanovlm.messages import TrialRecord
from nanovlm.results.terminal.console import PLAIN


class NotesDisplay:
    """Prints each note the first time that it comes."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._shown = set[str]()

    def update(self, record: TrialRecord) -> None:
        """Take in a change of a trial."""
        for text in (note for report in record.reports for note in report.notes):
            self.show(text)

    def show(self, text: str) -> None:
        """Print a note."""
        if text not in self._shown:
            self._shown.add(text)
            self._console.print(f"note: {text}", style="yellow", **PLAIN)
