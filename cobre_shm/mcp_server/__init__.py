"""A server of the Model Context Protocol: ``python -m cobre_shm.mcp_server``.

    __main__   arguments and the two transports
    server     the protocol's side: tools, resources, progress, cancellation
    tools      what they do, as functions of a session
    folders    which files a client may name
    schema     what ``config.json`` may hold, as JSON Schema

One process, which trains with one ``LocalCommunicator`` that it makes at its start. Needs
``pip install "cobre-shm[mcp,sddp]"``. The protocol: https://modelcontextprotocol.io
"""
