"""The contract with gunicorn: this package alone imports it, and writes attributes of its objects.

    arbiter, worker         one typed façade for each of gunicorn's two objects, which is all that the other parts know
    patches                 the table of all that is replaced or written, checked at start
    config, versions, exits its configuration, its releases and worker classes, its exit statuses and exceptions
    sockets, control_socket, signal_queue, ownership, logger_class, check_config_option    one concept each
    sync, gthread, gevent, asgi, uvicorn    what one worker class needs
    closing_connections, silent_connections, request_heads    what serves several classes
    kept_gthread, kept_gevent, kept_asyncio    their kept connections; kept_interface has what they share
    boundary                what of ours runs in gunicorn's loop does not raise there

What is relied on beside the table has a test each in tests/contract, which comments name.
"""
