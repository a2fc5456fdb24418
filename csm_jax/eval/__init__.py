"""Evaluation: what a model says, heard by a recogniser, counted, and told with its uncertainty.

    manifest -> spoken by the engine (or recordings that are there) -> heard -> measured -> eval.json, report.html

`metrics` are functions of words, audio and codes alone; `recognisers` hear; `run` does the rows one after
the other; `summary` makes them figures with confidence intervals; `report` draws them.
"""
