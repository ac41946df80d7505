"""A server for the OpenAI chat-completions protocol, with a web page."""
