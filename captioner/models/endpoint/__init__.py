"""Captions by OpenAI-compatible model servers: vLLM, SGLang, LMDeploy, llama.cpp, Ollama, LM Studio, a cloud.

    probing      at the start of a run: what the servers are, by one small image
    asking       one request to one server, and what its failure means
    reply        whether an answer is a caption
    sharing      which server gets the next request
    captioning   the captioner of `captioner.models.load`

No server is contacted that was not named, and redirects are not followed. httpx2 is imported when a server is asked.
"""
