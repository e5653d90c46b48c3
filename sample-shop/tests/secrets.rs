//! Tests passwords that come from files or the environment instead of the command line.
#![cfg(unix)]
#![allow(clippy::unwrap_used)]

#[path = "../../tests/tests/postgres/server.rs"]
#[allow(dead_code)]
mod server;

use std::process::{Command, Output};

use annals_tests::kafka::{self, Broker};
use sqlx::{Connection, PgConnection};

use self::server::Server;

const PASSWORD: &str = "horse battery/staple@?&%41";

fn shop(words: &[&str], environment: &[(&str, &str)]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_sample-shop"));
    command
        .args(words)
        .env_remove("PGPASSWORD")
        .env_remove("PGPASSFILE")
        .env("HOME", "/none")
        .envs(environment.to_vec());
    command.output().unwrap()
}

fn said(output: &Output) -> String {
    let said = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    assert!(!said.contains(PASSWORD) && !said.contains("horse"), "{said}");
    said
}

#[tokio::test]
async fn password_comes_from_a_file_or_the_environment() {
    let folder = tempfile::tempdir().unwrap();
    let data = folder.path().join("data");
    let server = Server::start_in(folder, data.clone(), Vec::new()).await;
    let mut connection = PgConnection::connect(&server.url()).await.unwrap();
    let role = format!("CREATE ROLE shop LOGIN PASSWORD '{PASSWORD}'; GRANT CREATE ON DATABASE postgres TO shop");
    sqlx::raw_sql(sqlx::AssertSqlSafe(role)).execute(&mut connection).await.unwrap();
    let rules = "host all shop 127.0.0.1/32 scram-sha-256\nhost all all 127.0.0.1/32 trust\n";
    std::fs::write(data.join("pg_hba.conf"), rules).unwrap();
    // The postmaster reads the file again before it accepts the next connection, and reports the reload.
    sqlx::raw_sql("SELECT pg_reload_conf()").execute(&mut connection).await.unwrap();
    let loaded = "SELECT count(*) FROM pg_hba_file_rules WHERE auth_method = 'scram-sha-256'";
    assert_eq!(sqlx::query_scalar::<_, i64>(loaded).fetch_one(&mut connection).await.unwrap(), 1);

    let secrets = tempfile::tempdir().unwrap();
    let file = |name: &str, text: &str| {
        let path = secrets.path().join(name);
        std::fs::write(&path, text).unwrap();
        path.display().to_string()
    };
    let right = file("right", &format!("{PASSWORD}\n"));
    let wrong = file("wrong", "guessed");
    let empty = file("empty", "\n");
    let port = server.url().rsplit_once(':').unwrap().1.to_owned();
    let base = format!("postgres://shop@127.0.0.1:{port}");
    let passfile = file("passfile", &format!("127.0.0.1:*:*:shop:{}\n", PASSWORD.replace(':', "\\:")));
    Command::new("chmod").args(["600", &passfile]).status().unwrap();
    let by_file = format!("{base}?schema=shop&password_file={right}");
    for (url, environment) in [
        (by_file.clone(), [("X", "")]),
        (format!("{base}?schema=shop&password_env=SHOP_PASSWORD"), [("SHOP_PASSWORD", PASSWORD)]),
        (format!("{base}?schema=shop"), [("PGPASSWORD", PASSWORD)]),
        (format!("{base}?schema=shop"), [("PGPASSFILE", &passfile)]),
    ] {
        let run = ["run", "--generate", "3", "--json", "--store", &url];
        let output = shop(&run, &environment);
        assert!(output.status.success(), "{url}: {}", said(&output));
        let read = shop(&["ops", "streams", "--json", "--schema", "shop", "--store", &url], &environment);
        assert!(read.status.success() && said(&read).contains("order-g7-000001"), "{url}: {}", said(&read));
    }
    for (url, parts) in [
        (format!("{base}?password_file={wrong}"), &["password authentication failed"][..]),
        (format!("{base}?password_file={empty}"), &[&*empty, "is empty"]),
        (format!("{base}?password_file=/none/secret"), &["password_file /none/secret: No such file"]),
        (format!("{base}?password_env=SHOP_NONE"), &["environment variable SHOP_NONE is not set"]),
        (format!("{base}?password_file={right}&password_env=X"), &["more than one password"]),
        (by_file.replace("shop@", "shop:horse@"), &["more than one password"]),
    ] {
        let output = shop(&["run", "--generate", "3", "--store", &url], &[]);
        let said = said(&output);
        assert_eq!(output.status.code(), Some(2), "{url}: {said}");
        for part in parts {
            assert!(said.contains(part), "{url}: {said}");
        }
    }
}

#[test]
fn kafka_password_comes_from_a_file_or_the_environment() {
    let broker = Broker::secured("SASL_PLAINTEXT");
    let secrets = tempfile::tempdir().unwrap();
    let file = |name: &str, text: &str| {
        let path = secrets.path().join(name);
        std::fs::write(&path, text).unwrap();
        path.display().to_string()
    };
    let right = file("right", &format!("{}\n", kafka::PASSWORD));
    let wrong = file("wrong", "guessed");
    let store = format!("sqlite:{}", secrets.path().join("shop.db").display());
    let login = format!("security.protocol=SASL_PLAINTEXT&sasl.mechanism=PLAIN&sasl.username={}", kafka::USER);
    let run = |password: &str, environment: &[(&str, &str)]| {
        let bus = format!("kafka://{}?{login}&{password}", broker.address());
        shop(&["run", "--generate", "3", "--json", "--store", &store, "--bus", &bus], environment)
    };
    for (password, environment) in [
        (format!("sasl.password_file={right}"), [("X", "")]),
        ("sasl.password_env=SHOP_KAFKA".to_owned(), [("SHOP_KAFKA", kafka::PASSWORD)]),
    ] {
        let output = run(&password, &environment);
        assert!(output.status.success(), "{password}: {:?} {}", output.status, said(&output));
        assert!(said(&output).contains("\"confirmed\":3"), "{password}: {}", said(&output));
    }
    for (password, part) in [
        (format!("sasl.password_file={wrong}"), "uthentication failed"),
        ("sasl.password_file=/none/secret".to_owned(), "sasl.password: /none/secret: No such file"),
        ("sasl.password_env=SHOP_NONE".to_owned(), "environment variable SHOP_NONE is not set"),
    ] {
        let output = run(&password, &[]);
        let said = said(&output);
        assert_eq!(output.status.code(), Some(2), "{password}: {said}");
        assert!(said.contains(part), "{password}: {said}");
    }
}
