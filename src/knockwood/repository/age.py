"""age encryption as a stream: what it writes opens with the stock `age` program, without Knockwood."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import pyrage

from knockwood.errors import ObjectDamagedError, SettingsError, WrongKeyError
from knockwood.repository.pipe import Pipe, PipeBrokenError


def recipients_from(texts: Sequence[str]) -> list[Any]:
    """The recipients named by `age1...` and `ssh-...` public keys; raises SettingsError for anything else."""
    return [_recipient(text.strip()) for text in texts]


def _recipient(text: str) -> Any:
    kind = pyrage.ssh.Recipient if text.startswith("ssh-") else pyrage.x25519.Recipient
    if text.startswith("AGE-SECRET-KEY-"):
        # Never echo it: this one is the secret half.
        raise SettingsError(
            "a secret key was given where the public one belongs",
            hint="encrypt to the line that begins with age1: `age-keygen -y FILE` prints it",
        )
    try:
        return kind.from_str(text)
    except pyrage.RecipientError as error:
        raise SettingsError(
            f"not an age recipient: {error}",
            where=text,
            hint="a recipient begins with age1 or ssh-; `age-keygen` makes a pair of keys",
        ) from error


def identities_from(texts: Sequence[str]) -> list[Any]:
    """The secret keys in `texts`: lines of `AGE-SECRET-KEY-1...` (comments allowed) or an SSH private key.

    Raises SettingsError for anything else; no message ever holds a secret.
    """
    found: list[Any] = []
    for text in texts:
        try:
            if "-----BEGIN" in text:
                found.append(pyrage.ssh.Identity.from_buffer(text.encode()))
                continue
            lines = (line.strip() for line in text.splitlines())
            found += [
                pyrage.x25519.Identity.from_str(line) for line in lines if line and not line.startswith("#")
            ]
        except pyrage.IdentityError as error:
            raise SettingsError(
                f"not an age identity: {error}",
                hint="an identity is the line AGE-SECRET-KEY-1... that `age-keygen` printed",
            ) from error
    return found


def encrypt(chunks: Iterable[bytes], recipients: Sequence[str]) -> Iterator[bytes]:
    """Encrypt a stream to every recipient; raises SettingsError for a recipient that is none."""
    keys = recipients_from(recipients)
    return _through(chunks, lambda pipe: pyrage.encrypt_io(pipe, pipe, keys))


def decrypt(chunks: Iterable[bytes], identities: Sequence[str]) -> Iterator[bytes]:
    """Decrypt a stream. Raises WrongKeyError, or ObjectDamagedError where it was changed or cut short.

    Pieces are authentic when they come out, but only the normal end says that nothing is missing.
    """
    keys = identities_from(identities)
    if not keys:
        raise WrongKeyError(
            "the object is encrypted and no identity was given",
            hint="give the age identity whose public key the repository was encrypted to",
        )
    return _decrypt(chunks, keys)


def _decrypt(chunks: Iterable[bytes], keys: list[Any]) -> Iterator[bytes]:
    try:
        yield from _through(chunks, lambda pipe: pyrage.decrypt_io(pipe, pipe, keys))
    except PipeBrokenError as broken:
        error = broken.cause
        if not isinstance(error, pyrage.DecryptError):
            raise ObjectDamagedError("encrypted content was changed or cut short") from error
        if "No matching keys" in str(error):
            raise WrongKeyError(
                "no identity given can decrypt the object",
                hint="was it written with other recipients? `age -d -i KEYFILE` tells the same",
            ) from error
        raise ObjectDamagedError(f"not a whole age file: {str(error).lower()}") from error


def _through(chunks: Iterable[bytes], work: Callable[[Pipe], None]) -> Iterator[bytes]:
    """Run `work` in a thread between `chunks` and the iterator returned; closing that ends it at once."""
    pipe = Pipe(work, "age")
    try:
        for chunk in chunks:
            while not pipe.offer(chunk):
                yield from pipe.take()
            yield from pipe.take()
        pipe.end_of_input()
        while pipe.wait_for_output():
            yield from pipe.take()
        pipe.raise_failure()
    finally:
        pipe.abandon()
