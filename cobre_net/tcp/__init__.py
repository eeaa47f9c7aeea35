"""The tcp backend: ranks on any hosts in a star around rank 0, over persistent connections.

    wire          the frames: their layout, tags, limits, and what each may contain
    call          what a collective is, in words that are compared
    failure       the first failure of a group, on the wire and as an exception
    handshake     who is there: the two-way challenge, without sockets
    secret        where the secret comes from, and where none is needed
    link          one connection: what of a frame has been sent and received
    joining       how a rank finds the coordinator
    listening     the coordinator's socket
    reception     how the ranks come together there
    reducing      the reduction kernels, by address
    flows         payloads in frames: streams with places to come from and to go to
    patience      time limits, warnings
    star          what both ends of the star have, and the small rounds between them
    centre        rank 0's view of the group, and what went wrong
    centre_small  rank 0's side of small collectives
    coordinator   rank 0's side of large ones
    worker        the side of the others
    sentinel      the thread of rank 0 that notices a lost peer between collectives
    membership    joining, entering a collective, failing, leaving
    plans         small collectives prepared once
    communicator  the contract

A module imports only from those above it. ``cobre_net/DESIGN.md`` says who may wait for whom.
"""

from cobre_net.tcp.communicator import TcpCommunicator as TcpCommunicator

__all__ = ["TcpCommunicator"]
