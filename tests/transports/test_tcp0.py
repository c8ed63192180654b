from weightcast.testing.transport_suite import TransportSuite
class TestTcp(TransportSuite):
    transport = "weightcast.transports.tcp:TcpTransport"
class TestTls(TransportSuite):
    transport = "weightcast.transports.tls:TlsTransport"
