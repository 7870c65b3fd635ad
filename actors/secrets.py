"""Which environment variables are keys to models, data and storage.

They reach actors by a call and nothing else: what stands in a runtime environment, an entry point or a job's metadata is kept
by Ray in the open, and shown on its dashboard.
"""

import os

NAMES = {
    "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "GOOGLE_APPLICATION_CREDENTIALS",
    # A key is useless without its region and endpoint.
    "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_PROFILE", "AWS_REGION", "AWS_DEFAULT_REGION", "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3",
}
PREFIXES = ("AZURE_", "FSSPEC_")  # what adlfs reads, and arguments of any file system, such as FSSPEC_S3_SECRET


def secrets_here() -> dict[str, str]:
    """Those set in this process."""
    return {name: value for name, value in sorted(os.environ.items()) if value and (name in NAMES or name.startswith(PREFIXES))}
