//! TLS connections to a server, with certificates that the test creates.
#![cfg(target_os = "linux")]
#![allow(clippy::unwrap_used)]

mod postgres;

use std::{fs, os::unix::fs::chown, path::Path, process::Command};

use annals::EventStore;
use annals_postgres::{OpenError, PostgresStore, Replay, Settings};
use futures::TryStreamExt;
use sqlx::{Connection, PgConnection};
use tempfile::TempDir;

use self::postgres::{
    append,
    server::{Server, postgres_user},
};

fn openssl(folder: &Path, arguments: &str) {
    let output = Command::new("openssl").args(arguments.split(' ')).current_dir(folder).output();
    let output = output.expect("OpenSSL must be installed: `./test` does that");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

/// Creates a certificate authority in the files `<name>.crt` and `<name>.key`.
fn authority(folder: &Path, name: &str) {
    let curve = "-newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes";
    openssl(folder, &format!("req -x509 {curve} -keyout {name}.key -out {name}.crt -days 2 -subj /CN={name}"));
}

/// Returns a server whose certificate for `localhost` is signed by the authority `ca`, not by `other`.
async fn server() -> (Server, TempDir) {
    let certificates = tempfile::tempdir().unwrap();
    let path = certificates.path();
    authority(path, "ca");
    authority(path, "other");
    let curve = "-newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes";
    openssl(path, &format!("req {curve} -keyout server.key -out server.csr -subj /CN=localhost"));
    fs::write(path.join("names"), "subjectAltName=DNS:localhost").unwrap();
    let signed = "-CA ca.crt -CAkey ca.key -CAcreateserial -days 2 -extfile names";
    openssl(path, &format!("x509 -req -in server.csr {signed} -out server.crt"));
    if let Some((user, group)) = postgres_user() {
        for path in [path, &path.join("server.key"), &path.join("server.crt")] {
            chown(path, Some(user), Some(group)).unwrap();
        }
    }
    let file = |name: &str| path.join(name).display().to_string();
    let settings = vec![
        "ssl=on".into(),
        format!("ssl_cert_file={}", file("server.crt")),
        format!("ssl_key_file={}", file("server.key")),
    ];
    let folder = tempfile::tempdir().unwrap();
    let data = folder.path().join("data");
    (Server::start_in(folder, data, settings).await, certificates)
}

#[tokio::test(flavor = "multi_thread")]
async fn every_connection_is_as_secure_as_its_url_demands() {
    let (server, certificates) = server().await;
    let root = |name: &str| format!("sslrootcert={}", certificates.path().join(name).display());
    let of_ca = root("ca.crt");
    let of_other = root("other.crt");
    let open = async |host: &str, parameters: &str| {
        let url = format!("{}?application_name=annals-tls&{parameters}", server.url_at(host));
        PostgresStore::connect(&url, Settings::default()).await
    };
    for (host, parameters) in [
        ("127.0.0.1", "sslmode=require".to_owned()),
        ("127.0.0.1", format!("sslmode=verify-ca&{of_ca}")),
        ("localhost", format!("sslmode=verify-full&{of_ca}")),
        // Even without a parameter, TLS is used if the server offers it.
        ("127.0.0.1", String::new()),
    ] {
        let store = open(host, &parameters).await.unwrap();
        let stream = format!("a-{}", uuid::Uuid::new_v4());
        store.commit(append(&stream, 0, 1)).await.unwrap();
        let replayed: Vec<_> = store.replay(Replay::all()).try_collect().await.unwrap();
        assert_eq!(replayed.last().unwrap().stream.as_str(), stream);
        let sql = "SELECT count(*), count(*) FILTER (WHERE s.ssl) FROM pg_stat_activity AS a JOIN pg_stat_ssl AS s USING (pid)
                    WHERE a.application_name = 'annals-tls'";
        let mut outside = PgConnection::connect(&server.url()).await.unwrap();
        let (sessions, secured): (i64, i64) = sqlx::query_as(sql).fetch_one(&mut outside).await.unwrap();
        assert!(sessions >= 2 && secured == sessions, "{parameters}: {secured} of {sessions} sessions");
        store.close().await.unwrap();
        let gone = "SELECT count(*) = 0 FROM pg_stat_activity WHERE application_name = 'annals-tls'";
        while !sqlx::query_scalar::<_, bool>(gone).fetch_one(&mut outside).await.unwrap() {
            tokio::task::yield_now().await;
        }
    }
    for (host, parameters) in [
        // Each URL is rejected: for another host name, for another authority, and without a known authority.
        ("127.0.0.1", format!("sslmode=verify-full&{of_ca}")),
        ("localhost", format!("sslmode=verify-full&{of_other}")),
        ("localhost", format!("sslmode=verify-ca&{of_other}")),
        ("localhost", "sslmode=verify-full".to_owned()),
    ] {
        let error = open(host, &parameters).await.unwrap_err();
        assert!(matches!(error, OpenError::Tls { .. }), "{host} {parameters}: {error:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn server_without_tls_is_refused_if_tls_is_required() {
    let server = Server::start().await;
    for mode in ["require", "verify-ca", "verify-full"] {
        let url = format!("{}?sslmode={mode}", server.url());
        let error = PostgresStore::connect(&url, Settings::default()).await.unwrap_err();
        assert!(matches!(error, OpenError::Tls { .. }), "{error:?}");
    }
    PostgresStore::connect(&server.url(), Settings::default()).await.unwrap().close().await.unwrap();
}
