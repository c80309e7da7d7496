//! TLS between agents, with certificates made here.

use std::io::{Read, Write};
use std::net::TcpStream;

use blockplane_transfer::{
    Agent, AgentConfig, AgentError, ConnectError, Lane, Op, Pem, TlsConfig, TlsPeerName,
};
use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair, date_time_ymd};

use crate::support::{Blocks, Pair, WAIT, arena, scattered};

/// An authority that makes certificates.
pub(crate) struct Authority {
    issuer: Issuer<'static, KeyPair>,
    pem: String,
}

impl Authority {
    pub(crate) fn new() -> Self {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let pem = params.self_signed(&key).unwrap().pem();
        let issuer = Issuer::new(params, key);
        Self { issuer, pem }
    }

    /// A certificate for `name`, valid or expired, and the roots of this authority.
    fn issue(&self, name: &str, expired: bool) -> TlsConfig {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::new(vec![name.to_owned()]).unwrap();
        if expired {
            params.not_before = date_time_ymd(2001, 1, 1);
            params.not_after = date_time_ymd(2002, 1, 1);
        }
        let certificate = params.signed_by(&key, &self.issuer).unwrap();
        TlsConfig::new(
            pem(certificate.pem()),
            pem(key.serialize_pem()),
            pem(self.pem.clone()),
        )
    }

    /// What an agent on the loopback address needs.
    pub(crate) fn local(&self) -> TlsConfig {
        self.issue("127.0.0.1", false)
    }
}

fn pem(text: String) -> Pem {
    Pem::Bytes(text.into())
}

fn agent(name: &str, tls: Option<TlsConfig>) -> Agent {
    let mut config = AgentConfig::new(name).with_lanes([Lane::Tcp]);
    config.tls = tls;
    Agent::new(config).unwrap()
}

/// Both connect and exchange bytes and a notification.
fn works(a: Agent, b: Agent) {
    let peer = a.connect(&b.metadata(), WAIT).unwrap();
    let reason = &peer.lane().reason;
    assert!(reason.contains("TLS"), "{reason}");
    let pair = Pair { a, b, peer };
    let bytes = 64 * 100_000;
    let (local, remote) = (arena(&pair.a, bytes), arena(&pair.b, bytes));
    let blocks = |seed| Blocks::flat(64, 100_000, &scattered(64, 40, seed));
    pair.check(Op::Write, (&local, &blocks(1)), (&remote, &blocks(2)));
    pair.check(Op::Read, (&local, &blocks(3)), (&remote, &blocks(4)));
    let sent = pair.a.notify(&pair.peer, "hello", WAIT).unwrap();
    sent.wait(WAIT).unwrap();
    let received = pair.b.notifications().recv_timeout(WAIT).unwrap();
    assert_eq!(received.payload, "hello");
}

/// Why the connection fails, in words.
fn refusal(a: &Agent, b: &Agent) -> String {
    match a.connect(&b.metadata(), WAIT) {
        Err(ConnectError::NoLane { tried, .. }) => tried[0].1.clone(),
        other => panic!("{other:?}"),
    }
}

#[test]
fn mutual_tls_works() {
    let authority = Authority::new();
    works(
        agent("a", Some(authority.local())),
        agent("b", Some(authority.local())),
    );
}

#[test]
fn targets_may_do_without_client_certificates() {
    let (authority, stranger) = (Authority::new(), Authority::new());
    let mut open = authority.local();
    open.require_client_certificate = false;
    // A certificate that the target would not accept, and roots to know the target by.
    let mut anonymous = stranger.local();
    anonymous.roots = open.roots.clone();
    works(agent("a", Some(anonymous)), agent("b", Some(open)));
}

#[test]
fn a_client_without_a_valid_certificate_is_refused() {
    let (authority, stranger) = (Authority::new(), Authority::new());
    let target = agent("b", Some(authority.local()));
    let mut foreign = stranger.local();
    foreign.roots = authority.local().roots;
    let why = refusal(&agent("a", Some(foreign)), &target);
    assert!(why.contains("alert"), "{why}");
    let why = refusal(
        &agent("a", Some(authority.issue("127.0.0.1", true))),
        &target,
    );
    assert!(why.contains("CertificateExpired"), "{why}");
}

#[test]
fn a_target_without_a_valid_certificate_is_not_talked_to() {
    let (authority, stranger) = (Authority::new(), Authority::new());
    let me = agent("a", Some(authority.local()));
    for (certificate, expected) in [
        (stranger.local(), "invalid peer certificate"),
        (authority.issue("127.0.0.1", true), "expired"),
        (authority.issue("127.0.0.2", false), "not valid for name"),
    ] {
        let why = refusal(&me, &agent("b", Some(certificate)));
        assert!(why.contains(expected), "{why}");
    }
}

#[test]
fn peers_can_be_known_by_the_name_of_their_agent() {
    let authority = Authority::new();
    let named = |name: &str| {
        let mut config = authority.issue(name, false);
        config.peer_name = TlsPeerName::Agent;
        agent(name, Some(config))
    };
    works(named("worker-1"), named("worker-2"));
    let mut impostor = authority.issue("worker-1", false);
    impostor.peer_name = TlsPeerName::Agent;
    let why = refusal(&named("worker-1"), &agent("worker-2", Some(impostor)));
    assert!(why.contains("not valid for name"), "{why}");
}

#[test]
fn plaintext_and_tls_name_each_other() {
    let authority = Authority::new();
    let (plain, secure) = (
        agent("plain", None),
        agent("secure", Some(authority.local())),
    );
    let why = refusal(&plain, &secure);
    assert!(why.contains("the peer requires TLS"), "{why}");
    let why = refusal(&secure, &plain);
    assert!(why.contains("the peer answers in plaintext"), "{why}");
}

#[test]
fn probes_get_nothing_and_leave_nothing() {
    let authority = Authority::new();
    let target = agent("b", Some(authority.local()));
    let friend = agent("a", Some(authority.local()));
    let peer = friend.connect(&target.metadata(), WAIT).unwrap();
    let reason = &peer.lane().reason;
    let address = reason.split(' ').nth(2).unwrap();
    for probe in [
        &b"GET / HTTP/1.0\r\n\r\n"[..],
        &[22, 3, 1, 0, 4, 1, 0, 0, 0],
        &[22; 3000],
    ] {
        let mut socket = TcpStream::connect(address).unwrap();
        socket.set_read_timeout(Some(WAIT)).unwrap();
        socket.write_all(probe).unwrap();
        // A refusal or an alert, and the end; a reset is an end as well.
        let mut answer = Vec::new();
        let _ = socket.read_to_end(&mut answer);
        assert!(answer.len() <= 64, "{answer:?}");
    }
    works(friend, target);
}

#[test]
fn unusable_certificates_are_named() {
    let authority = Authority::new();
    let start = |change: &dyn Fn(&mut TlsConfig)| {
        let mut tls = authority.local();
        change(&mut tls);
        let mut config = AgentConfig::new("a").with_lanes([Lane::Tcp]);
        config.tls = Some(tls);
        Agent::new(config).unwrap_err()
    };
    let field = |error| match error {
        AgentError::InvalidConfig { field, .. } => field,
        other => panic!("{other:?}"),
    };
    let empty = |pem: &mut Pem| *pem = Pem::Bytes(Vec::new());
    assert_eq!(
        field(start(&|tls| empty(&mut tls.certificate_chain))),
        "tls.certificate_chain"
    );
    assert_eq!(
        field(start(&|tls| empty(&mut tls.private_key))),
        "tls.private_key"
    );
    assert_eq!(field(start(&|tls| empty(&mut tls.roots))), "tls.roots");
    // A key that belongs to another certificate.
    let other = |tls: &mut TlsConfig| tls.private_key = Authority::new().local().private_key;
    assert_eq!(field(start(&other)), "tls.private_key");
    let missing = start(&|tls| tls.roots = Pem::File("/nowhere/roots.pem".into()));
    assert!(
        missing.to_string().contains("/nowhere/roots.pem"),
        "{missing}"
    );
}
