"""Everything this package raises, and the exit code each kind has on the command line.

HubError (1)
├── UsageError (2)         a reference, flag or variable that cannot be right
├── NotFoundError (3)      no hub that was asked has the model, revision or file
├── GatedError (4)         the hub wants a licence accepted or a token
├── OfflineError (5)       not on this machine, and the network may not be used
├── IntegrityError (6)     bytes differ from what the hub says they are
├── NetworkError (7)       the hub did not answer, or answered with an error of its own
└── DiskFullError (8)      the snapshot does not fit
"""


class HubError(RuntimeError):
    """Base of the errors that users are meant to read; ``str()`` is one paragraph without a traceback."""

    exit_code = 1


class UsageError(HubError):
    """What the user typed or exported cannot be right."""

    exit_code = 2


class NotFoundError(HubError):
    """No hub that was asked has it."""

    exit_code = 3


class GatedError(HubError):
    """The hub refuses it without a licence or a token; never tried elsewhere."""

    exit_code = 4


class OfflineError(HubError):
    """It is not on this machine, and the network may not be used."""

    exit_code = 5


class IntegrityError(HubError):
    """Bytes differ from what the hub says they are."""

    exit_code = 6


class NetworkError(HubError):
    """The hub did not answer, or answered with an error of its own."""

    exit_code = 7


class DiskFullError(HubError):
    """The snapshot does not fit on its volume."""

    exit_code = 8


EXIT_CODES: tuple[tuple[int, str], ...] = (
    (0, "done"),
    (1, "failed; the last line says why"),
    (2, "usage: a flag, reference or variable that cannot be right"),
    (3, "not found"),
    (4, "gated: accept the licence or set a token"),
    (5, "offline and not on this machine"),
    (6, "integrity: bytes differ from what the hub says"),
    (7, "network"),
    (8, "disk full"),
    (130, "stopped with Ctrl-C"),
)
