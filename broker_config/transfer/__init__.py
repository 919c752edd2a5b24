"""A large payload over the bus: in chunks, windowed, paced, acknowledged end to end, in exactly one end state.

One whose receiver needs no more before all is there is delivered, too: see Incoming.has_enough.
"""

from broker_config.transfer.inbox import Inbox
from broker_config.transfer.incoming import Incoming
from broker_config.transfer.outgoing import DEFAULT_WINDOW_BYTES, send
from broker_config.transfer.pacing import Pacer
from broker_config.transfer.window import Sent

__all__ = ["DEFAULT_WINDOW_BYTES", "Inbox", "Incoming", "Pacer", "Sent", "send"]
