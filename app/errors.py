"""What can go wrong, as one tree; only ``api/problems.py`` knows which HTTP status each has.

::

    NormGateError
    ├── ImageError
    │   ├── UnsupportedImageError    the bytes are not an image of an accepted format
    │   ├── ImageTooLargeError       the header promises more pixels than the limit
    │   └── UndecodableImageError    the image is truncated or corrupt
    ├── NetworkError                 a network cannot be built, loaded or read
    ├── CalibrationError             the images cannot carry the calibration asked for
    ├── BundleError                  a bundle is missing, damaged or not for this installation
    │   ├── BundleNotFoundError      no bundle of that name and version
    │   ├── StoreUnavailableError    the store cannot be reached now
    │   ├── ActivationError          a bundle cannot serve; what answered before still does
    │   └── EngineError              an engine cannot run the bundle, or scores otherwise
    │       ├── NoEngineError        the engine, or its exporter, is not installed
    │       ├── NoGraphsError        nothing was exported for the engine
    │       └── UnfitEngineError     the engine does not run networks of this kind
    ├── ReviewError                  a review queue cannot be exported as it is
    ├── SettingsError                a setting is unknown or out of bounds
    └── ServingError                 a request cannot be answered now, or ever
        ├── MalformedRequestError    the request is not one the service understands
        ├── UnauthorizedError        no valid credentials
        ├── ForbiddenError           valid credentials that do not suffice
        ├── ReviewNotFoundError      the review queue has no such image, or no longer
        ├── RequestTooLargeError     the body has more bytes than the limit
        ├── BusyError                no room now; come back after ``retry_after_s``
        │   ├── QueueFullError       too many images wait
        │   └── MemoryBudgetError    too many bytes are in flight
        ├── NotReadyError            the models are still loading, or the service is draining
        ├── DeadlineExceededError    the deadline passed before the answer
        ├── ForwardError             the network failed on the batch
        └── UpstreamError            the classifier behind the proxy cannot be reached, or broke off
            └── UpstreamTimeoutError it was silent for too long
"""


class NormGateError(Exception):
    """Any error NormGate raises on purpose; the message is one line fit for a user."""


class ImageError(NormGateError):
    """An image that cannot be scored."""


class UnsupportedImageError(ImageError):
    """The bytes are not an image of an accepted format."""


class ImageTooLargeError(ImageError):
    """The header promises more pixels than the limit."""


class UndecodableImageError(ImageError):
    """The image is truncated or corrupt."""


class NetworkError(NormGateError):
    """A network cannot be built, loaded or read."""


class CalibrationError(NormGateError):
    """The images cannot carry the calibration asked for."""


class BundleError(NormGateError):
    """A bundle is missing, damaged or not for this installation."""


class BundleNotFoundError(BundleError):
    """No bundle of that name and version."""


class StoreUnavailableError(BundleError):
    """The store cannot be reached now; nothing is said of what it holds."""

    retry_after_s = 10


class ActivationError(BundleError):
    """A bundle cannot serve; what answered before still does."""


class ReviewError(NormGateError):
    """A review queue cannot be exported as it is."""


class EngineError(BundleError):
    """An engine cannot run the bundle's network, or does not score as torch does."""


class NoEngineError(EngineError):
    """The engine, or what exports for it, is not installed."""


class NoGraphsError(EngineError):
    """The bundle has no graphs for the engine."""


class UnfitEngineError(EngineError):
    """The engine does not run networks of the bundle's kind."""


class SettingsError(NormGateError):
    """A setting is unknown or out of bounds."""


class ServingError(NormGateError):
    """A request cannot be answered now, or ever."""


class MalformedRequestError(ServingError):
    """The request is not one the service understands."""


class UnauthorizedError(ServingError):
    """No valid credentials."""


class ForbiddenError(ServingError):
    """Valid credentials that do not suffice."""


class ReviewNotFoundError(ServingError):
    """The review queue has no such image, or no longer."""


class RequestTooLargeError(ServingError):
    """The body has more bytes than the limit."""


class DeadlineExceededError(ServingError):
    """The deadline passed before the answer."""


class ForwardError(ServingError):
    """The network failed on the batch."""


class UpstreamError(ServingError):
    """The classifier behind the proxy cannot be reached, or broke off."""


class UpstreamTimeoutError(UpstreamError):
    """It was silent for too long."""


class BusyError(ServingError):
    """No room now.

    Args:
        message: fit for a client.
        retry_after_s: when room is expected, in whole seconds.
    """

    def __init__(self, message: str, *, retry_after_s: int) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class QueueFullError(BusyError):
    """Too many images wait, or too long for the deadline."""


class MemoryBudgetError(BusyError):
    """Too many bytes are in flight."""


class NotReadyError(ServingError):
    """The models are still loading, or the service is draining.

    Args:
        message: fit for a client.
        retry_after_s: when to come back, in whole seconds.
    """

    def __init__(self, message: str, *, retry_after_s: int = 1) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s
