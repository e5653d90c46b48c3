//! Renamed schemas: a store either uses the schema with the given name, or is rejected before anything is written.
#![allow(clippy::unwrap_used)]

mod postgres;

use annals::{EventStore, Operator, Position};
use annals_postgres::{OpenError, PostgresStore, Settings};
use sqlx::{AssertSqlSafe, Connection, PgConnection};

use self::postgres::{Schema, append, url, whole_log};

fn settings(schema: &str) -> Settings {
    Settings { schema: schema.to_owned(), connections: 2 }
}

async fn run(connection: &mut PgConnection, sql: String) {
    sqlx::raw_sql(AssertSqlSafe(sql)).execute(connection).await.unwrap();
}

async fn events(connection: &mut PgConnection, schema: &str) -> i64 {
    let sql = AssertSqlSafe(format!("SELECT count(*) FROM {schema}.events"));
    sqlx::query_scalar(sql).fetch_one(connection).await.unwrap()
}

/// Creates a store with three events in `old`, renames that schema to `kept`, and creates a new store under the old
/// name.
async fn renamed() -> (Schema, Schema, PgConnection) {
    let [old, kept] = [Schema::new(), Schema::new()];
    let store = old.store().await;
    store.commit(append("a-1", 0, 3)).await.unwrap();
    store.close().await.unwrap();
    let mut connection = old.connection().await;
    run(&mut connection, format!("ALTER SCHEMA {} RENAME TO {}", old.name(), kept.name())).await;
    let new = old.store().await;
    new.commit(append("a-1", 0, 1)).await.unwrap();
    new.close().await.unwrap();
    (old, kept, connection)
}

#[tokio::test]
async fn renamed_schema_is_refused_for_restricted_roles() {
    let (old, kept, mut connection) = renamed().await;
    let opened = PostgresStore::connect_existing(&url(), settings(kept.name())).await;
    match opened {
        Err(OpenError::Renamed { schema, found }) => assert_eq!((&*schema, &*found), (kept.name(), old.name())),
        other => panic!("the schema was renamed: {other:?}"),
    }
    // A role that does not own the schema must not trigger changes to it.
    let writer = kept.role("writer");
    run(&mut connection, format!("CREATE ROLE {writer} LOGIN")).await;
    run(&mut connection, format!("GRANT USAGE ON SCHEMA {} TO {writer}", kept.name())).await;
    for table in ["events", "documents", "migrations"] {
        run(&mut connection, format!("GRANT SELECT, INSERT ON {}.{table} TO {writer}", kept.name())).await;
    }
    let role = url().parse::<sqlx::postgres::PgConnectOptions>().unwrap().username(&writer);
    let as_writer = sqlx::ConnectOptions::to_url_lossy(&role).to_string();
    let opened = PostgresStore::connect(&as_writer, settings(kept.name())).await;
    assert!(matches!(opened, Err(OpenError::Renamed { .. })), "{opened:?}");
    assert_eq!((events(&mut connection, kept.name()).await, events(&mut connection, old.name()).await), (3, 1));
    run(&mut connection, format!("DROP OWNED BY {writer}")).await;
    connection.close().await.unwrap();
}

#[tokio::test]
async fn renamed_schema_works_after_its_owner_has_opened_it() {
    let (old, kept, mut connection) = renamed().await;
    for _ in 0..2 {
        let store = PostgresStore::connect(&url(), settings(kept.name())).await.unwrap();
        let stands = whole_log(&store).await.len() as i64;
        // Few rows, many rows and an operator's action each use a different statement.
        store.commit(append("a-1", stands, 1)).await.unwrap();
        store.commit(append("a-1", stands + 1, 2)).await.unwrap();
        store.commit(append("a-1", stands + 3, 40)).await.unwrap();
        assert_eq!(whole_log(&store).await.len() as i64, stands + 43);
        store.close().await.unwrap();
    }
    let store = PostgresStore::connect_existing(&url(), settings(kept.name())).await.unwrap();
    assert!(store.status().await.unwrap().head > Position(80));
    store.close().await.unwrap();
    assert_eq!((events(&mut connection, kept.name()).await, events(&mut connection, old.name()).await), (89, 1));
    // After a second rename, the functions use the last name.
    let third = Schema::new();
    run(&mut connection, format!("ALTER SCHEMA {} RENAME TO {}", kept.name(), third.name())).await;
    let store = PostgresStore::connect(&url(), settings(third.name())).await.unwrap();
    store.commit(append("b-1", 0, 2)).await.unwrap();
    store.close().await.unwrap();
    assert_eq!(events(&mut connection, third.name()).await, 91);
    connection.close().await.unwrap();
}

/// Grants survive a rename and keep their meaning.
#[tokio::test]
async fn operators_of_a_renamed_schema_keep_their_rights() {
    let (_old, kept, mut connection) = renamed().await;
    let role = kept.role("operator");
    run(&mut connection, format!("CREATE ROLE {role} LOGIN")).await;
    PostgresStore::connect(&url(), settings(kept.name())).await.unwrap().close().await.unwrap();
    run(&mut connection, format!("SELECT {}.grant_access('{role}', 'operator')", kept.name())).await;
    let options = url().parse::<sqlx::postgres::PgConnectOptions>().unwrap().username(&role);
    let as_operator = sqlx::ConnectOptions::to_url_lossy(&options).to_string();
    let store = PostgresStore::connect(&as_operator, settings(kept.name())).await.unwrap();
    let operator = Operator::new(std::sync::Arc::new(store.clone()), "ada");
    let refused = operator.reset("nothing", Position(0), "test").await;
    assert!(refused.is_err(), "there is no such subscription");
    store.close().await.unwrap();
    run(&mut connection, format!("DROP OWNED BY {role}")).await;
    connection.close().await.unwrap();
}

/// Two stores are independent even if the name of one is part of the other's name.
#[tokio::test]
async fn schemas_in_one_database_are_independent() {
    let one = Schema::new();
    let longer = format!("{}_x", one.name());
    let stores = [
        PostgresStore::connect(&url(), settings(one.name())).await.unwrap(),
        PostgresStore::connect(&url(), settings(&longer)).await.unwrap(),
    ];
    for (count, store) in (1..).zip(&stores) {
        store.commit(append("a-1", 0, count)).await.unwrap();
        assert_eq!(whole_log(store).await.len(), count);
        store.close().await.unwrap();
    }
    for schema in [one.name(), &longer] {
        PostgresStore::connect_existing(&url(), settings(schema)).await.unwrap().close().await.unwrap();
    }
    let mut connection = one.connection().await;
    run(&mut connection, format!("DROP SCHEMA {longer} CASCADE")).await;
    connection.close().await.unwrap();
}

#[tokio::test]
async fn unknown_parameters_are_refused_by_name_without_effect() {
    let schema = Schema::new();
    let name = schema.name();
    for (parameters, reason) in [
        (format!("shcema={name}"), "`shcema` is unknown: did you mean `schema`?"),
        (format!("Schema={name}"), "`Schema` is unknown: did you mean `schema`?"),
        (format!("schema={name}&target_session_attrs=read-write"), "`target_session_attrs` is unknown"),
        (format!("schema={name}&connect_timeout=10"), "`connect_timeout` is unknown"),
        (format!("schema={name}&sslMode=require"), "did you mean `sslmode`?"),
        (format!("schema={name}&pool=true"), "`pool` is unknown"),
        (format!("schema={name}&schema={name}"), "`schema` is given twice"),
        (format!("schema={name}&sslmode=prefer&ssl-mode=disable"), "`sslmode` is given twice"),
        (format!("schema={name}&pooled"), "no `=`"),
        (format!("schema={name}#pooled=true"), "%23"),
        (format!("%73chema={name}"), "is unknown"),
    ] {
        let separator = if url().contains('?') { '&' } else { '?' };
        let given = format!("{}{separator}{parameters}", url());
        for opened in [
            PostgresStore::connect(&given, Settings::default()).await,
            PostgresStore::connect_existing(&given, Settings::default()).await,
        ] {
            match opened {
                Err(OpenError::Url { reason: said }) => assert!(said.contains(reason), "{parameters}: {said}"),
                other => panic!("{parameters}: {other:?}"),
            }
        }
    }
    let made: bool = sqlx::query_scalar("SELECT EXISTS (SELECT FROM pg_namespace WHERE nspname IN ($1, 'annals'))")
        .bind(name)
        .fetch_one(&mut schema.connection().await)
        .await
        .unwrap();
    assert!(!made, "nothing may be made");
}
