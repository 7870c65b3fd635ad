"""The embedded demo model: a four-block GPT-NeoX trained by this project on public-domain novels."""

from pathlib import Path

DEMO_MODEL = Path(__file__).parent / "pythia-mini"
