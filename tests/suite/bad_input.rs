//! Bad input is refused with an error that says what is wrong, and nothing reaches etcd.

use std::time::{Duration, Instant};

use etcd_recipes::etcd_client::{Compare, CompareOp, DeleteOptions, Txn, TxnOp};
use etcd_recipes::{Election, Error, MAX_NAME, Mutex, Result, Session};

use crate::support::check::{Scope, scoped, scoped_on};
use crate::support::needs::{Needs, lacking};
use crate::support::proxy::{Mode, Proxy};
use crate::support::server::{Options, Server};
use crate::support::sessions::{connect, session};

/// etcd's limit of a request.
const LIMIT: usize = 1536 * 1024;

/// The error, which its kind and its text must tell apart from others.
fn refused<T>(result: Result<T>, kind: fn(&Error) -> bool, says: &[&str]) -> String {
    let Err(error) = result else { panic!("not refused") };
    assert!(kind(&error), "another kind: {error:?}");
    let text = error.to_string();
    for part in says {
        assert!(text.contains(part), "no {part:?} in: {text}");
    }
    text
}

fn invalid_name(error: &Error) -> bool {
    matches!(error, Error::InvalidName { .. })
}

fn too_large(error: &Error) -> bool {
    matches!(error, Error::TooLarge { .. })
}

fn invalid_option(error: &Error) -> bool {
    matches!(error, Error::InvalidOption { .. })
}

/// What a server holds: its revision counts every write there ever was.
async fn state(server: &Server) -> (i64, Vec<i64>) {
    (server.revision().await, server.leases().await)
}

#[tokio::test]
async fn names_that_cannot_be_keys_are_refused() {
    let server = Server::fast().await;
    scoped_on(&server, async |scope| {
        let session = session(scope).await;
        let before = state(&server).await;
        let long = vec![b'n'; MAX_NAME + 1];
        let names: [(&[u8], &[&str]); 4] = [
            (b"", &["\"\"", "empty"]),
            (b"a\0b", &["NUL", "a\\u{0}b"]),
            (b"\0", &["NUL"]),
            (&long, &["1,024 bytes", "nnn…"]),
        ];
        for (name, says) in names {
            let text = refused(Mutex::new(&session, name), invalid_name, says);
            assert!(text.len() < 300 && !text.contains('\0'), "{text}");
            assert_eq!(text, refused(Election::new(&session, name), invalid_name, says));
        }
        assert_eq!(state(&server).await, before);
        session.close().await.unwrap();
    })
    .await;
}

#[tokio::test]
async fn names_that_look_strange_are_used_as_they_are() {
    scoped(async |scope| {
        let session = session(scope).await;
        let mut names: Vec<Vec<u8>> = ["", "/", "//x", "-ü-漢", " ", "\n", "%2F..", "-*"]
            .map(|rest| format!("{}{rest}", scope.name()).into_bytes())
            .into();
        names.push([scope.name().as_bytes(), b"\xff\xfe\x80"].concat());
        names.push([scope.name().as_bytes(), &vec![b'n'; MAX_NAME - scope.name().len()]].concat());
        for name in names {
            let mutex = Mutex::new(&session, &name).unwrap();
            let guard = mutex.try_lock().await.unwrap().expect("free");
            assert!(guard.key().starts_with(&[name.as_slice(), b"/"].concat()));
            guard.unlock().await.unwrap();
        }
        session.close().await.unwrap();
    })
    .await;
}

#[tokio::test]
async fn a_name_above_or_below_another_is_refused_where_one_session_uses_both() {
    scoped(async |scope| {
        let (ours, theirs) = (session(scope).await, session(scope).await);
        let (name, below) = (scope.name().to_owned(), scope.key("below"));
        let nested = [below.clone(), scope.key("a/b/c"), format!("{name}/"), format!("{name}//")];
        let upper = Mutex::new(&ours, &name).unwrap();
        for nested in &nested {
            refused(Mutex::new(&ours, nested), invalid_name, &["the same up to a '/'", nested]);
            refused(Election::new(&ours, nested), invalid_name, &["one line"]);
        }
        // The other way round, and as long as one of them is in use.
        let guard = upper.lock().await.unwrap();
        drop(upper);
        refused(Mutex::new(&ours, &below), invalid_name, &["the same up to a '/'"]);
        guard.unlock().await.unwrap();
        let lower = Election::new(&ours, &below).unwrap();
        refused(Mutex::new(&ours, &name), invalid_name, &["the same up to a '/'"]);
        // Beside each other is fine, and so is the same name twice.
        Mutex::new(&ours, scope.key("beside")).unwrap();
        Mutex::new(&ours, format!("{below}2")).unwrap();
        Mutex::new(&ours, &below).unwrap();
        // Another session cannot know; it is documented.
        Mutex::new(&theirs, &name).unwrap();
        drop(lower);
        Mutex::new(&ours, &name).unwrap();
        assert!(scope.keys().await.is_empty());
        ours.close().await.unwrap();
        theirs.close().await.unwrap();
    })
    .await;
}

#[tokio::test]
async fn options_out_of_range_are_refused() {
    let server = Server::fast().await;
    scoped_on(&server, async |scope| {
        let before = state(&server).await;
        let builder = || Session::builder([scope.endpoint()]);
        let second = Duration::from_secs(1);
        let ttls = [
            (Duration::ZERO, "less than a second"),
            (Duration::from_millis(999), "less than a second"),
            (Duration::from_millis(1500), "whole seconds"),
            (Duration::from_secs(9_000_000_001), "9,000,000,000"),
            (Duration::MAX, "9,000,000,000"),
        ];
        for (ttl, says) in ttls {
            let text = refused(builder().ttl(ttl).connect().await, invalid_option, &["`ttl`", says]);
            assert!(text.contains(&format!("{ttl:?}")), "{text}");
        }
        for namespace in ["", "no-slash", "nul\0/"] {
            let refusal = builder().namespace(namespace).connect().await;
            refused(refusal, invalid_option, &["`namespace`", "'/'"]);
        }
        let identity = "i".repeat(2000);
        refused(builder().identity(identity).connect().await, invalid_option, &["`identity`", "1,024"]);
        let none: [String; 0] = [];
        refused(Session::connect(none).await, invalid_option, &["`endpoints`", "none"]);
        // A password must not travel in clear because a scheme was forgotten.
        let bare = scope.endpoint().trim_start_matches("http://").to_owned();
        let refusal = Session::builder([bare]).user("u", "secret").connect().await;
        let text = refused(refusal, invalid_option, &["`user`", "http://", "https://"]);
        assert!(!text.contains("secret"));
        assert_eq!(state(&server).await, before);

        // The largest and the smallest that are allowed.
        for ttl in [second, Duration::from_secs(9_000_000_000)] {
            connect(scope, builder().ttl(ttl)).await.close().await.unwrap();
        }
    })
    .await;
}

#[tokio::test]
async fn endpoints_that_are_none_are_refused() {
    let endpoints = [
        "",
        ":2379",
        "http://",
        "http://:2379",
        "no such thing",
        "http://a b",
        "127.0.0.1:99999",
        "127.0.0.1:",
        "127.0.0.1:x",
        "ftp://127.0.0.1:2379",
        "://127.0.0.1:2379",
    ];
    for endpoint in endpoints {
        let begin = Instant::now();
        let refusal = Session::connect(["127.0.0.1:2379", endpoint]).await;
        refused(refusal, invalid_option, &["`endpoints`", &format!("\"{endpoint}\"")]);
        assert!(begin.elapsed() < Duration::from_secs(1), "nothing is to be tried");
    }
    // What is in front of an '@' may be a password.
    let refusal = Session::connect(["http://root:secret@127.0.0.1:2379"]).await;
    assert!(!refused(refusal, invalid_option, &["`endpoints`", "`user`"]).contains("secret"));
}

#[tokio::test]
async fn when_no_endpoint_answers_the_error_names_them_in_time() {
    let server = Server::fast().await;
    let (refusing, silent) = (Proxy::start(server.endpoint()).await, Proxy::start(server.endpoint()).await);
    refusing.set(Mode::Refuse).await;
    silent.set(Mode::HoleBoth).await;
    let limit = Duration::from_secs(2);
    scoped_on(&server, async |_| {
        let sets =
            [vec![&refusing], vec![&silent], vec![&refusing, &silent], vec![&silent, &silent, &refusing]];
        for set in sets {
            for user in [false, true] {
                let endpoints: Vec<String> = set.iter().map(|proxy| proxy.endpoint()).collect();
                let builder = Session::builder(endpoints.clone()).connect_timeout(limit);
                let builder = if user { builder.user("u", "secret") } else { builder };
                let begin = Instant::now();
                let result = builder.connect().await;
                let took = begin.elapsed();
                let unreachable = |error: &Error| matches!(error, Error::Unreachable { .. });
                let says: Vec<&str> = endpoints.iter().map(String::as_str).chain(["2s"]).collect();
                refused(result, unreachable, &says);
                assert!(took >= limit - Duration::from_millis(100), "it gave up early: {took:?}");
                assert!(took < limit + Duration::from_secs(1), "too late: {took:?}");
            }
        }
        assert_eq!(state(&server).await, (1, Vec::new()));
    })
    .await;
}

/// A transaction of so many puts of so many bytes.
fn puts(scope: &Scope, count: usize, bytes: usize) -> Txn {
    let ops = (0..count).map(|number| TxnOp::put(scope.key(&format!("data/{number}")), vec![0; bytes], None));
    Txn::new().and_then(ops.collect::<Vec<_>>())
}

#[tokio::test]
async fn values_over_the_request_limit_are_refused_and_those_at_the_limit_are_not() {
    let server = Server::fast().await;
    scoped_on(&server, async |scope| {
        let session = session(scope).await;
        // A long name, since it is in the request several times.
        let name = format!("{}/{}", scope.name(), "n".repeat(MAX_NAME - scope.name().len() - 1));
        let election = Election::new(&session, &name).unwrap();
        let revision = server.revision().await;
        let Err(Error::TooLarge { limit, .. }) = election.campaign(vec![0; LIMIT]).await else {
            panic!("not refused")
        };
        assert!(limit < LIMIT && limit > LIMIT - 16 * 1024, "room for keys, but not much: {limit}");
        let says = [(limit + 1).to_string(), limit.to_string(), "the value, in bytes,".into()];
        let says = says.each_ref().map(String::as_str);
        refused(election.campaign(vec![0; limit + 1]).await, too_large, &says);
        refused(election.campaign(vec![0; 100 * 1024 * 1024]).await, too_large, &[]);
        assert_eq!(server.revision().await, revision, "nothing was sent");

        let leadership = election.campaign(vec![1; limit]).await.unwrap();
        leadership.proclaim(vec![2; limit]).await.unwrap();
        let revision = server.revision().await;
        refused(leadership.proclaim(vec![3; limit + 1]).await, too_large, &says);
        assert!(leadership.is_held(), "a refused value is no loss");
        refused(
            leadership.txn(puts(scope, 2, limit / 2 + 10)).await,
            too_large,
            &["the transaction, in bytes,"],
        );
        assert_eq!(server.revision().await, revision);
        leadership.txn(puts(scope, 10, limit / 10 - 200)).await.unwrap();
        let options = DeleteOptions::new().with_prefix();
        leadership
            .txn(Txn::new().and_then([TxnOp::delete(scope.key("data/"), Some(options))]))
            .await
            .unwrap();
        leadership.resign().await.unwrap();
        session.close().await.unwrap();
    })
    .await;
}

#[tokio::test]
async fn more_operations_than_a_transaction_takes_are_refused() {
    let server = Server::fast().await;
    scoped_on(&server, async |scope| {
        let session = session(scope).await;
        let guard = Mutex::new(&session, scope.key("lock")).unwrap().lock().await.unwrap();
        // Four of etcd's 128 are the guard's own.
        guard.txn(puts(scope, 124, 1)).await.unwrap();
        let revision = server.revision().await;
        let says = ["the number of operations", "125", "124"];
        refused(guard.txn(puts(scope, 125, 1)).await, too_large, &says);
        let reads: Vec<_> = (0..125).map(|_| TxnOp::get("x", None)).collect();
        refused(guard.txn(Txn::new().or_else(reads)).await, too_large, &says);
        let compares: Vec<_> = (0..125).map(|_| Compare::version("x", CompareOp::Equal, 0)).collect();
        refused(guard.txn(Txn::new().when(compares)).await, too_large, &says);
        // Inside a transaction inside.
        let inner = TxnOp::txn(puts(scope, 125, 1));
        refused(
            guard.txn(Txn::new().and_then([inner])).await,
            too_large,
            &["the number of operations", "126", "124"],
        );
        guard.txn(Txn::new().and_then([TxnOp::txn(puts(scope, 123, 1))])).await.unwrap();
        assert_eq!(server.revision().await, revision + 1);
        assert!(guard.is_held());
        let options = DeleteOptions::new().with_prefix();
        scope.client().delete(scope.key("data/"), Some(options)).await.unwrap();
        guard.unlock().await.unwrap();
        session.close().await.unwrap();
    })
    .await;
}

#[tokio::test]
async fn requests_that_only_the_server_finds_too_large_fail_and_are_not_tried_for_ever() {
    if lacking(Needs::Settings) {
        return;
    }
    // This server takes less than others: 100 KiB, and gRPC's own limit lies a little above.
    let server = Server::with(Options::fast().arg("--max-request-bytes=102400")).await;
    scoped_on(&server, async |scope| {
        let session = session(scope).await;
        let election = Election::new(&session, scope.key("election")).unwrap();
        let soon = Duration::from_secs(5);
        let refusal = |error: &Error| matches!(error, Error::Etcd { .. } | Error::TooLarge { .. });
        for size in [200 * 1024, 1400 * 1024] {
            let campaign = tokio::time::timeout(soon, election.campaign(vec![0; size])).await;
            refused(campaign.expect("tried for ever"), refusal, &[scope.name()]);
            let leadership = election.campaign("small").await.unwrap();
            let proclaim = tokio::time::timeout(soon, leadership.proclaim(vec![0; size])).await;
            refused(proclaim.expect("tried for ever"), refusal, &[scope.name()]);
            let txn = tokio::time::timeout(soon, leadership.txn(puts(scope, 1, size))).await;
            refused(txn.expect("tried for ever"), refusal, &[scope.name()]);
            assert!(leadership.is_held());
            leadership.resign().await.unwrap();
        }
        assert!(scope.keys().await.is_empty());
        session.close().await.unwrap();
    })
    .await;
}

#[tokio::test]
async fn transactions_whose_size_is_in_reads_and_conditions_are_refused_as_well() {
    scoped(async |scope| {
        let session = session(scope).await;
        let guard = Mutex::new(&session, scope.key("lock")).unwrap().lock().await.unwrap();
        let key = vec![b'k'; LIMIT + 600 * 1024];
        let value = Compare::value("x", CompareOp::Equal, key.clone());
        let soon = Duration::from_secs(5);
        for txn in [
            Txn::new().and_then([TxnOp::get(key.clone(), None)]),
            Txn::new().or_else([TxnOp::delete(key.clone(), None)]),
            Txn::new().and_then([TxnOp::txn(Txn::new().and_then([TxnOp::put("x", key.clone(), None)]))]),
            Txn::new().when([value]),
        ] {
            let answer = tokio::time::timeout(soon, guard.txn(txn)).await.expect("tried for ever");
            refused(answer, too_large, &["the transaction, in bytes,"]);
        }
        guard.unlock().await.unwrap();
        session.close().await.unwrap();
    })
    .await;
}
