"""Corpus synthesis that loses nothing: plan, run, commit, verify, export.

A corpus is a directory:

    plan.json                    what is spoken, by what: the fingerprint; written last when planning
    rows.jsonl                   the manifest's good rows, in the order of the shards
    rejected.jsonl               the manifest's bad rows, each with its line number and its error
    shards/shard-00000.tar       a WebDataset shard: KEY.flac, KEY.codes.npy, KEY.json per row
    shards/shard-00000.errors.jsonl    rows that failed; only where there are any
    shards/shard-00000.json      the commit: written last, it makes the two above count

Nothing else is state. What has no commit is done again; what has one is never touched.
"""
