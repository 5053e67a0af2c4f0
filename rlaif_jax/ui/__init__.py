"""The annotation page in the browser; needs the extra `ui`.

People compare, rank, rate, edit and comment on answers, and chat with a model.
"""
