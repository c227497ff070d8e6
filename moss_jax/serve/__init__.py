"""The web demo. Only `app` depends on Gradio; `session` is one conversation without a browser."""
