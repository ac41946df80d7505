"""A model behind the OpenAI chat-completions protocol, and a page to talk to it."""
