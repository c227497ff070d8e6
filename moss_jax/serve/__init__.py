"""The web demo. Only `app` knows Gradio; `session` is what it does, without a browser."""
