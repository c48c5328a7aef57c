"""Serving an artifact: requests that are decoded together (:mod:`.engine`) behind the OpenAI API (:mod:`.app`)."""
