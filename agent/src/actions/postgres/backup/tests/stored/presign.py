"""Signs requests: ENDPOINT ACCESS SECRET SECONDS BUCKET, then METHOD KEY in turn; a URL a line."""

import sys

import botocore.session
from botocore.config import Config

endpoint, access, secret, seconds, bucket, *requests = sys.argv[1:]
client = botocore.session.get_session().create_client(
    "s3",
    endpoint_url=endpoint,
    region_name="us-east-1",
    aws_access_key_id=access,
    aws_secret_access_key=secret,
    config=Config(signature_version="s3v4", s3={"addressing_style": "path"}),
)
for method, key in zip(requests[::2], requests[1::2]):
    url = client.generate_presigned_url(
        method, Params={"Bucket": bucket, "Key": key}, ExpiresIn=int(seconds)
    )
    print(url)
