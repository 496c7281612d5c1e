"""Let unit tests import the collection from the checkout, as ansible itself does."""

from pathlib import Path

from ansible.utils.collection_loader._collection_finder import _AnsibleCollectionFinder

ROOT = Path(__file__).resolve().parents[2]

_AnsibleCollectionFinder(paths=[str(ROOT / ".collections")])._install()
