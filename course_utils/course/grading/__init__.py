"""Grading a class: `course grade SUBMISSIONS --out DIR`.

Of a learner's notebooks the exercises' cells are taken, by their ids, and nothing else. Who may
know what is decided by processes:

    grade    reads the submissions and writes the results; never runs a learner's code
    server   has imported everything once and forks; it never sees a submission
    judge    one an exercise: the course's check, in a fork of the server
    answer   one an exercise: the learner's cell, in a fork of its own, behind `walls`

Most checks run in the judge and call the answer across a socket (`remote`): what comes back is
rebuilt from plain numbers, strings, lists and tensors (`wire`), never unpickled. The exercises in
`jobs.WITHIN` cannot be asked that way, for the check and the answer share graphs, layers or a
clock: there the check runs beside the answer, and `tampering` watches.
"""
