"""A chapter as slides: question, prediction, figures, verdicts, myths and quiz from the same source
and the same outputs as its notebook, with the prose and the teacher's notes as speaker notes.
"""
