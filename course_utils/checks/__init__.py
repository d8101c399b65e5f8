"""The exercise checks, one module a chapter. A check holds properties and independent results,
never the solution.
"""
