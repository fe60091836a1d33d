"""What an object store's client reports, in our words: passing or lasting, and what mends it."""

from __future__ import annotations

import re
from typing import Final

from knockwood.errors import ObjectMissingError, RepositoryError, StorageUnavailableError

_STATUS: Final = re.compile(r"status code: (\d{3})")
_CODE: Final = re.compile(r"<Code>(\w+)</Code>")
_PASSING_CODES: Final = frozenset({"408", "409", "425", "429"})
_NO_BUCKET: Final = ("NoSuchBucket", "ContainerNotFound", "The specified bucket does not exist")
_UNREACHABLE: Final = (
    "HTTP error",
    "error sending request",
    "error decoding response body",
    "timed out",
    "TimedOut",
    "Connect",
    "connection",
)


def translate(error: Exception, where: str) -> RepositoryError:
    """The error to raise for one that obstore raised while it worked on `where`."""
    text = str(error)
    first = re.sub(r"\?\S*", "", text.partition("\n")[0])[:300]
    status = found[1] if (found := _STATUS.search(text)) else ""
    code = found[1] if (found := _CODE.search(text)) else ""
    if any(word in text for word in _NO_BUCKET):
        return RepositoryError(
            "the bucket does not exist", where=where, hint="make it first, or mend the repository's address"
        )
    if isinstance(error, FileNotFoundError):
        return ObjectMissingError("no such object", where=where)
    if "169.254.169.254" in text or "metadata.google.internal" in text or "Credentials" in text:
        return RepositoryError(
            "no credentials for the object store were found",
            where=where,
            hint="set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, GOOGLE_APPLICATION_CREDENTIALS or AZURE_*",
        )
    if status in ("401", "403") or type(error).__name__ in ("PermissionDeniedError", "UnauthenticatedError"):
        return _denied(code, status, where)
    if status in ("301", "307") or code in ("PermanentRedirect", "AuthorizationHeaderMalformed"):
        return RepositoryError(
            "the bucket is in another region", where=where, hint="set AWS_REGION to the bucket's region"
        )
    if type(error).__name__ == "NotSupportedError" or status == "501" or code == "NotImplemented":
        return RepositoryError(
            "the object store cannot create an object only if it is absent",
            where=where,
            hint="use a store with conditional writes (If-None-Match): others could overwrite a backup",
        )
    if "BadScheme" in text:
        return RepositoryError(
            "the object store's address is not encrypted (http)",
            where=where,
            hint="use https, or set AWS_ALLOW_HTTP=true if that is meant",
        )
    if status.startswith("5") or status in _PASSING_CODES:
        return StorageUnavailableError(
            f"the object store answers with status {status}" + (f" ({code})" if code else ""),
            where=where,
            hint="the store is failing or overloaded: try again later; its own status page or log says more",
        )
    if not status and any(word in text for word in _UNREACHABLE):
        return StorageUnavailableError(
            f"the object store does not answer: {first}",
            where=where,
            hint="is the address right (AWS_ENDPOINT_URL), and is the network up?",
        )
    return RepositoryError(f"the object store refused: {first}", where=where)


def _denied(code: str, status: str, where: str) -> RepositoryError:
    if code in ("InvalidAccessKeyId", "SignatureDoesNotMatch", "InvalidToken", "ExpiredToken"):
        return RepositoryError(
            f"the object store does not accept the credentials ({code})",
            where=where,
            hint="are AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and this machine's clock right?",
        )
    if code == "RequestTimeTooSkewed":
        return RepositoryError(
            "this machine's clock differs from the object store's", where=where, hint="set the clock (NTP)"
        )
    return RepositoryError(
        f"the object store denies access (status {status or '403'})",
        where=where,
        hint="on S3 Knockwood needs s3:GetObject, s3:PutObject, s3:DeleteObject, "
        "s3:AbortMultipartUpload on the objects and s3:ListBucket on the bucket",
    )
