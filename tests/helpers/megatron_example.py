"""Shards as Megatron's MIMO example has them."""

import io
import json
import tarfile

from tests.helpers import broken


def write_megatron_example(folder, name="shard_0.tar", count=12):
    """A picture and two recordings a sample; both spoken questions are answered."""
    folder.mkdir(exist_ok=True)
    with tarfile.open(folder / name, "w") as tar:
        for number in range(count):
            key = f"{name[0]}{number}_100"
            recordings = [f"{key}.synthesized_{n}{number}-ab.wav.flac" for n in "ab"]
            record = {
                "num_image": 7,
                "conversations": broken.turns("<image><audio>") + broken.turns("<audio>", "no"),
                "audios": recordings,
                "images": [f"{key}.img"],
            }
            parts = {f"{key}.img": broken.GOOD["good.png"], f"{key}.json": json.dumps(record)}
            parts |= dict.fromkeys(recordings, broken.GOOD["good.flac"])
            for part, content in parts.items():
                data = content.encode() if isinstance(content, str) else content
                member = tarfile.TarInfo(part)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    return folder
