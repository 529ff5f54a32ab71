"""Files shipped with the package: a small trained GPT in Hugging Face format, and its training."""

from pathlib import Path

TINY = Path(__file__).parent / "tiny"
