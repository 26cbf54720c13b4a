"""Folders of pictures and of LoRAs to what training reads, however many there are.

A picture's way through `prepare`:

    sources → pictures, looker → catalogue → choices        → framing, captions → shards
    listed    opened, checked,   one row a   people named,    cut to its bucket,  Arrow files
              faces embedded     picture     duplicates out   described

`records` says what a prepared picture is, `prepared` reads a prepared dataset, `encodings` keeps
what costs more to make than to read (latents, encoded prompts, features), `lora_store` keeps LoRAs.

Neither pictures nor embeddings are ever in memory together. What was found out lies in a database
in the dataset's own folder and is known by the content of the files, so a run that was killed goes
on, and ends as one that was not.
"""
