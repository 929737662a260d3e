"""Compacts a store on request: one update that only drops what is old, then the file is rewritten without gaps."""

import sqlite3

from pmd.errors import MemoryStoreError
from pmd.memory.checksum import write_checksum, write_sum
from pmd.memory.store import MemoryStore
from pmd.memory.update import open_writer


def compact_store(store: MemoryStore, keep: int, *, archive: bool) -> dict[str, int]:
    """Drop what is older than `keep` generations and shrink the file; return the rows dropped by table.

    Raises:
        MemoryStoreError: the store cannot be written. It is as it was, or compacted but not yet smaller.
    """
    with open_writer(store) as writer:
        dropped = writer.compact(keep, archive=archive)
    try:
        write_sum(store.path, store.generation, None)  # the same generation is about to get other bytes
        store.db.execute("VACUUM")
        write_checksum(store.db, store.path, store.generation)
    except (OSError, sqlite3.Error) as error:
        raise MemoryStoreError(
            f"memory store={store.path} is compacted, but could not be made smaller ({error}); free disk space and "
            "repeat."
        ) from error
    return dropped
