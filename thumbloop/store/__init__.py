"""The store: one database, one module per noun, functions that take an open connection.

engine = open_store(state)                       # creates, migrates
writer = GroupWriter(engine)                     # the server: group commits
with reading(engine) as connection: ...          # short read transactions
with writing(engine) as connection: ...          # the trainer: one transaction per round
"""

from thumbloop.store.database import only_trainer, open_store, reading, writing
from thumbloop.store.writer import GroupWriter

__all__ = ["GroupWriter", "only_trainer", "open_store", "reading", "writing"]
