//! Runs each example as a reader would, and checks what it prints.

use std::{
    env,
    error::Error,
    fs,
    io::{BufRead, BufReader, Read, Write},
    net::TcpStream,
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
};

use sqlx::{AssertSqlSafe, Connection, PgConnection};
use uuid::Uuid;

type Outcome = Result<(), Box<dyn Error>>;

/// Returns the program of an example. A plain `cargo test` builds the examples into the folder next to this test's
/// folder. Cargo does not build them if the command line names only this test.
fn program(name: &str) -> Result<PathBuf, Box<dyn Error>> {
    let folder = env::current_exe()?.parent().and_then(Path::parent).map(|folder| folder.join("examples"));
    let program = folder.unwrap_or_default().join(name).with_extension(env::consts::EXE_EXTENSION);
    let built = fs::metadata(&program).and_then(|program| program.modified()).ok();
    let manifest = Path::new(env!("CARGO_MANIFEST_DIR"));
    let written = fs::metadata(manifest.join(name).with_extension("rs"))?.modified()?;
    if built.is_none_or(|built| built < written) {
        return Err(format!("{name} is not built: run `cargo build -p annals-examples --examples` first").into());
    }
    Ok(program)
}

/// Runs an example in a folder, with these environment variables removed.
fn run(name: &str, folder: &Path, arguments: &[&str], without: &[&str]) -> Result<Output, Box<dyn Error>> {
    let mut command = Command::new(program(name)?);
    without.iter().for_each(|variable| _ = command.env_remove(variable));
    Ok(command.args(arguments).current_dir(folder).output()?)
}

/// Runs an example in an empty folder and returns what it prints.
fn printed(name: &str, arguments: &[&str]) -> Result<String, Box<dyn Error>> {
    let folder = tempfile::tempdir()?;
    printed_in(folder.path(), name, arguments)
}

fn printed_in(folder: &Path, name: &str, arguments: &[&str]) -> Result<String, Box<dyn Error>> {
    let output = run(name, folder, arguments, &[])?;
    assert!(output.status.success(), "{name}: {}", String::from_utf8_lossy(&output.stderr));
    Ok(String::from_utf8(output.stdout)?)
}

/// Drops these schemas.
async fn drop_schemas(url: &str, schemas: &[String]) -> Outcome {
    let mut sql = PgConnection::connect(url).await?;
    for schema in schemas {
        sqlx::raw_sql(AssertSqlSafe(format!("DROP SCHEMA IF EXISTS {schema} CASCADE"))).execute(&mut sql).await?;
    }
    Ok(())
}

fn database() -> String {
    env::var("DATABASE_URL").unwrap_or_else(|_| panic!("DATABASE_URL is not set: run the tests with `./test`"))
}

#[test]
fn aggregate_decides_once_and_refuses() -> Outcome {
    let wanted = "\
first request:  [Deposited { pence: 250 }]
the same again: [Deposited { pence: 250 }], repeated: true
refused: the account holds only 250 pence
balance: 250 pence
";
    assert_eq!(printed("aggregate", &[])?, wanted);
    Ok(())
}

#[test]
fn sqlite_file_keeps_the_events_for_the_next_run() -> Outcome {
    let folder = tempfile::tempdir()?;
    let first = printed_in(folder.path(), "sqlite", &[])?;
    assert_eq!(first, "1 visits in visits.db\n1 page-home v1 page.visited {\"by\":\"ada\"}\n");
    let second = printed_in(folder.path(), "sqlite", &[])?;
    assert_eq!(second, first.replace("1 visits", "2 visits") + "2 page-home v2 page.visited {\"by\":\"ada\"}\n");
    Ok(())
}

#[test]
fn read_model_adds_up_by_customer() -> Outcome {
    assert_eq!(printed("read_model", &[])?, "ada: 2 orders, 1250 pence\nbob: 1 orders, 90 pence\n");
    Ok(())
}

#[test]
fn service_earns_points_for_orders_of_another_service() -> Outcome {
    assert_eq!(printed("two_services", &[])?, "ada has 12 points\n");
    Ok(())
}

#[test]
fn saga_ends_completed_or_compensated() -> Outcome {
    let wanted = "\
to-york is Completed with a room
to-tokyo is Compensated with no room, because of charge card: the card is declined
";
    assert_eq!(printed("saga", &[])?, wanted);
    Ok(())
}

#[tokio::test]
async fn services_on_postgresql_and_kafka_continue_where_they_ended() -> Outcome {
    let name = format!("example_{}", Uuid::new_v4().simple());
    assert_eq!(printed("postgres_and_kafka", &[&name])?, "ada had 0 points and has 12\n");
    assert_eq!(printed("postgres_and_kafka", &[&name])?, "ada had 12 points and has 24\n");
    drop_schemas(&database(), &[format!("{name}_orders"), format!("{name}_points")]).await
}

#[tokio::test]
async fn handler_writes_each_event_once_into_its_own_table() -> Outcome {
    let name = format!("example_{}", Uuid::new_v4().simple());
    assert_eq!(printed("sql_in_the_transaction", &[&name])?, "GB: 1250 pence\nJP: 90 pence\n");
    assert_eq!(printed("sql_in_the_transaction", &[&name])?, "GB: 2500 pence\nJP: 180 pence\n");
    let mut sql = PgConnection::connect(&database()).await?;
    let events = format!("SELECT count(*) FROM {name}.events WHERE type = 'order.placed'");
    let events: i64 = sqlx::query_scalar(AssertSqlSafe(events)).fetch_one(&mut sql).await?;
    assert_eq!(events, 6);
    drop_schemas(&database(), &[name]).await
}

#[test]
fn examples_without_their_servers_name_the_missing_variable() -> Outcome {
    let folder = tempfile::tempdir()?;
    for (example, variable) in [
        ("postgres_and_kafka", "DATABASE_URL"),
        ("sql_in_the_transaction", "DATABASE_URL"),
        ("postgres_and_kafka", "KAFKA_BROKERS"),
    ] {
        let name = format!("example_{}", Uuid::new_v4().simple());
        let output = run(example, folder.path(), &[&name], &[variable])?;
        assert!(!output.status.success(), "{example} runs without {variable}");
        let error = String::from_utf8(output.stderr)?;
        assert!(error.contains(&format!("set {variable} to a ")), "{error}");
    }
    Ok(())
}

#[test]
fn bank_carries_out_each_transfer_once() -> Outcome {
    let folder = tempfile::tempdir()?;
    let wanted = "\
rent: Completed
car: Rejected(\"only 20000 pence of the daily limit are left\")
gift: Rejected(\"there is no open account\")
Ada a1: 70000 pence, GBP
Ada a2: 500 pence, GBP
Bob b1: 32000 pence, GBP
";
    assert_eq!(printed_in(folder.path(), "bank", &[])?, wanted);
    assert_eq!(printed_in(folder.path(), "bank", &[])?, wanted, "the same commands again change nothing");
    Ok(())
}

/// Starts the service, calls it as its documentation says, and stops it with Ctrl-C.
#[cfg(unix)]
#[test]
fn service_answers_over_http_and_stops_in_good_order() -> Outcome {
    let folder = tempfile::tempdir()?;
    let mut service = Command::new(program("service_over_http")?)
        .env("LISTEN", "127.0.0.1:0")
        .current_dir(folder.path())
        .stdout(Stdio::piped())
        .spawn()?;
    let mut lines = BufReader::new(service.stdout.take().ok_or("no output")?).lines();
    let first = lines.next().ok_or("no first line")??;
    let address = first.split(&['/', ','][..]).nth(2).ok_or("no address")?.to_owned();
    let ask = |request: &str, body: &str| -> Result<String, Box<dyn Error>> {
        let mut stream = TcpStream::connect(&address)?;
        let length = body.len();
        let head = format!("{request} HTTP/1.1\r\nHost: bank\r\nConnection: close\r\nContent-Length: {length}\r\n");
        write!(stream, "{head}Content-Type: application/json\r\nIdempotency-Key: once\r\n\r\n{body}")?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        Ok(answer)
    };
    for _ in 0..2 {
        let opened = ask("POST /accounts/a", r#"{"open": {"owner": "ann"}}"#)?;
        assert!(opened.ends_with(r#"{"id":"a","version":1,"position":1}"#), "{opened}");
    }
    let refused = ask("POST /accounts/b", r#"{"credit": {"pence": 5}}"#)?;
    assert!(refused.starts_with("HTTP/1.1 422") && refused.contains(r#""refusal":"not_open""#), "{refused}");
    let owner = ask("GET /owners/ann?position=1&wait=20s", "")?;
    assert!(owner.ends_with(r#"{"accounts":1,"pence":0}"#), "{owner}");
    for (path, part) in [("/readyz", "\"ready\""), ("/metrics", "annals_http_"), ("/openapi.json", "/accounts/{id}")] {
        let answer = ask(&format!("GET {path}"), "")?;
        assert!(answer.starts_with("HTTP/1.1 200") && answer.contains(part), "{answer}");
    }
    // A follower learns that the service stops.
    let mut events = TcpStream::connect(&address)?;
    write!(events, "GET /events?after=0 HTTP/1.1\r\nHost: bank\r\n\r\n")?;
    let mut events = BufReader::new(events).lines();
    let mut until = |part: &str| events.by_ref().map_while(Result::ok).any(|line| line.contains(part));
    assert!(until("event: account.opened"));
    Command::new("kill").args(["-INT", &service.id().to_string()]).status()?;
    assert!(until("event: end") && until("the server stops"));
    assert!(service.wait()?.success());
    assert_eq!(lines.next().ok_or("no last line")??, "stopped");
    Ok(())
}
