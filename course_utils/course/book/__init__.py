"""The book: the committed notebooks, the atlas and "Guess first" as one folder of HTML that needs
nothing from elsewhere. `make book` writes it to build/book.
"""
