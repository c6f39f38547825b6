"""The cycle of retraining: rounds that distill new shards, train a candidate, and judge it beside the champion.

    WORK/rounds/<number>/round.json             the round's plan, created with put-if-absent
    WORK/rounds/<number>/targets/<place>/       new shards of one source, distilled by the champion: `air distill`
    WORK/rounds/<number>/run/                   the candidate's training: `air train`
    WORK/rounds/<number>/evaluation-<attempt>.parquet
    WORK/rounds/<number>/evaluation.json        the commit of the comparison, created with put-if-absent
    WORK/rounds/<number>/outcome.json           the end of the round, created with put-if-absent

The steps themselves are those of the commands; `jobs.retrain` calls them one after the other. This room knows what a
round needs, and what makes a candidate a champion.
"""
