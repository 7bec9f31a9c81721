"""``winnow profile``: calibration profiles that are installed, fetched from a repository of the Hub, or published there."""

from __future__ import annotations

import json
import shlex
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from winnowkv.cli.context import printable
from winnowkv.cli.options import Json, model_name
from winnowkv.cli.progress import working
from winnowkv.cli.tables import Column, ResultTable, keys, note, say
from winnowkv.errors import InputError, ProfileError, WinnowError

if TYPE_CHECKING:
    from winnowkv.models.calibration import CalibrationProfile
    from winnowkv.models.info import ModelInfo

ProfileFile = Annotated[Path, typer.Argument(metavar="FILE", help="A profile, as winnow calibrate writes it.")]
Name = Annotated[str, typer.Argument(metavar="NAME", help="A model's name or a file's, as winnow profile list shows it.")]


def publish(
    file: ProfileFile,
    repo: Annotated[str, typer.Argument(metavar="REPO_ID", help="Repository of the Hub, OWNER/NAME; made if it is not there.")],
    name: Annotated[
        str | None,
        typer.Option(help="What others call the model, its hub id. Default: as the profile says.", show_default=False),
    ] = None,
    revision: Annotated[
        str | None, typer.Option(help="Branch, made if it is not there. Default: the main one.", show_default=False)
    ] = None,
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
    message: Annotated[str | None, typer.Option(help="Message of the commit.", show_default=False)] = None,
    as_json: Json = False,
) -> None:
    """Upload a profile to a model repository of the Hugging Face Hub; a new one gets a README that says how it was measured.

    The token is the one of hf auth login, or HF_TOKEN.

    winnow profile publish profile.json OWNER/NAME --name Qwen/Qwen3-0.6B
    """
    from winnowkv.models.calibration import read_profile

    profile = read_profile(file)
    check_repository(repo)
    from winnowkv.calibrate.card import is_path, unsaid

    if name is not None:
        profile = replace(profile, model=name)
    if is_path(profile.model):
        raise InputError(
            f"{file} calls its model {profile.model!r}, a place on your machine: say what others call it, --name HUB_ID"
        )
    from winnowkv.calibrate import hub

    with working(f"publishing to {repo}"):
        found = hub.publish(profile, repo, revision=revision, private=private, message=message)
    left = unsaid(profile)
    if as_json:
        print(json.dumps({**vars(found), "repo": repo, "model": profile.model, "unsaid": left}, indent=2))
        return
    print(found.address)
    note(f"{'a new repository, ' if found.created else ''}commit {found.commit}" if found.changed else "it was there already")
    if left:
        note(f"the profile does not say {', '.join(left)}: a newer winnow calibrate does")
    called = shlex.quote(printable(profile.model))
    note(f"others get it: winnow profile fetch {called} --repo {repo}{f' --revision {revision}' if revision else ''}")


def fetch(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", callback=model_name, help="'embedded', a folder, or a hub id; its config is read.")
    ],
    repo: Annotated[
        str | None,
        typer.Option(envvar="WINNOW_PROFILES", help="Repository of the Hub that holds the profile.", show_default=False),
    ] = None,
    revision: Annotated[
        str | None, typer.Option(help="Branch, tag or commit. Default: the main branch.", show_default=False)
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Write it to this file, and do not install it.", show_default=False)] = None,
    as_json: Json = False,
) -> None:
    """Download a model's profile, check it, and install it where policies find it. Nothing else ever fetches a profile.

    winnow profile fetch Qwen/Qwen3-0.6B --repo OWNER/NAME
    """
    if not repo:
        raise InputError("no repository is named: give --repo OWNER/NAME, or set WINNOW_PROFILES to it")
    check_repository(repo)
    if out is not None:
        from winnowkv.cli.loading import check_file

        check_file(out, "--out")
    info = config_info(model)
    from winnowkv.calibrate import hub

    with working(f"fetching from {repo}"):
        found = hub.fetch(info, repo, revision=revision)
    installed = out is None
    told(stored(found.profile, out), found.profile, as_json, installed, {"address": found.address, "commit": found.commit})


def add(file: ProfileFile, as_json: Json = False) -> None:
    """Install a profile of your own, so that policies find it without being told its file."""
    from winnowkv.models.calibration import read_profile

    profile = read_profile(file)
    told(stored(profile, None), profile, as_json, True, {})


def remove(name: Name, as_json: Json = False) -> None:
    """Remove an installed profile; policies then use the one that ships, or none."""
    mine = [(path, called) for path, called in named_files(name) if is_installed(path)]
    if len(mine) != 1:
        why = f"{len(mine)} installed profiles are called" if mine else "no installed profile is called"
        raise InputError(f"{why} {name!r}: name the file, as winnow profile list shows it")
    (path, _) = mine[0]
    path.unlink()
    if as_json:
        print(json.dumps({"removed": str(path)}, indent=2))
    else:
        print(f"removed {path}")


def list_profiles(as_json: Json = False) -> None:
    """List the profiles that policies find by themselves: those that are installed, and those that ship with the package."""
    from winnowkv.models.calibration import profile_folder

    rows, damaged = found_profiles()
    if as_json:
        print(json.dumps({"folder": str(profile_folder()), "profiles": rows, "damaged": damaged}, indent=2, ensure_ascii=False))
        return
    table = ResultTable(
        [
            *keys("file"),
            *(Column(title) for title in ("is", "date", "seed", "answered", "heads")),
            Column("model", least=8),
            Column("curves", least=6),
        ]
    )
    for row in rows:
        table.add(
            row["file"],
            "installed" if row["installed"] else "shipped",
            text(row["date"]),
            text(row["seed"]),
            f"{text(row['answered'])} of {text(row['prompts'])}",
            f"{row['strong_heads']} of {row['heads']}",
            printable(row["model"]),
            ", ".join(row["curves"]) or "-",
        )
    if rows:
        table.print()
    note(f"installed ones are in {profile_folder()}; of a model that has both, policies use the installed one")
    for one in damaged:
        note(one["error"])


def show(name: Name, as_json: Json = False) -> None:
    """Show all that a profile says of itself. NAME may be a path, too."""
    from winnowkv.calibrate.card import facts, unsaid
    from winnowkv.models.calibration import read_profile

    there = named_files(name)
    paths = [Path(name)] if not there or Path(name).is_file() else [path for path, _ in there]
    if not paths[0].is_file():
        raise InputError(f"no profile is called {name!r}, and no file is there: see winnow profile list")
    profile = read_profile(paths[0])  # of an installed and a shipped one the first, as policies do
    known = {"path": str(paths[0]), **facts(profile)}
    strongest = [
        {"layer": layer, "head": head, "score": profile.semantic[layer][head]} for layer, head in profile.strong_heads()
    ]
    if as_json:
        print(json.dumps({**known, "strongest": strongest, "about": profile.about, "unsaid": unsaid(profile)}, indent=2))
        return
    print(f"profile of {printable(profile.model)}: {paths[0]}")
    info = profile.model_info
    say(f"class {info.architecture}, {info.layers} layers, {info.heads} query heads, {info.kv_heads} KV heads, {info.config}")
    heads = " ".join(f"{one['layer']}.{one['head']}" for one in strongest[:16])
    say(f"heads that stand out: {len(strongest)} of {known['heads']}, the strongest (layer.head): {heads}")
    say(f"curves for auto: {', '.join(f'{key} ({count} prompts)' for key, count in known['curves'].items()) or 'none'}")
    for key, value in profile.about.items():
        say(f"{printable(key)}: {printable(value if isinstance(value, str) else json.dumps(value))}")
    if left := unsaid(profile):
        note(f"it does not say {', '.join(left)}")


def check_repository(repo: str) -> None:
    """Raise InputError for what is no repository id with its owner."""
    from winnowkv.calibrate.card import HUB_ID

    if not HUB_ID.fullmatch(repo):
        raise InputError(f"{repo!r} is no repository id: write it as OWNER/NAME")


def config_info(model: str) -> ModelInfo:
    """What a profile has to have for a model, read from its config. Raises InputError if only the weights can tell."""
    from winnowkv.cli.loading import without_weights
    from winnowkv.models.info import ModelInfo

    with working(f"reading the config of {model}"):
        made = without_weights(model)
    if made is None:
        raise InputError(f"no model can be made of the config of {model!r} alone: calibrate it with winnow calibrate")
    return ModelInfo.of(made)


def stored(profile: CalibrationProfile, out: Path | None) -> Path:
    """Where a profile was written: ``out``, or the place in the user's folder where policies look for it."""
    from winnowkv.models.calibration import installed_file

    path = installed_file(profile.model_info) if out is None else out
    if out is None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ProfileError(f"{path.parent} cannot be made: {error.strerror}; set WINNOW_PROFILE_FOLDER") from None
    profile.write(path)
    return path


def told(path: Path, profile: CalibrationProfile, as_json: bool, installed: bool, more: dict[str, Any]) -> None:
    """Print where a profile is, and who uses it."""
    from winnowkv.calibrate.card import facts, unsaid

    users = using_policies()
    if as_json:
        found = {"path": str(path), "installed": installed, "policies": users, **facts(profile), "unsaid": unsaid(profile)}
        print(json.dumps({**found, **more}, indent=2, ensure_ascii=False))
        return
    print(path)
    if installed:
        note(f"{', '.join(users)} use it from now on for {printable(profile.model)} and other models of its class and sizes")
    else:
        note(f"use it: --policy {users[0]}:profile={path}; {', '.join(users)} read it")
    if profile.curves:
        where = "" if installed else f":{path}"
        note(f"curves for --budget auto:0.95{where}: {', '.join(profile.curves)}")
    if more:
        note(f"from {more['address']}")
    if left := unsaid(profile):
        note(f"it does not say {', '.join(left)}")


def using_policies() -> list[str]:
    """The policies that read profiles, by name."""
    from winnowkv.policies import names, policy_class
    from winnowkv.policies.registry import option_names

    return [name for name in names() if "profile" in option_names(policy_class(name))]


def found_profiles() -> tuple[list[dict[str, Any]], list[dict[str, str]]]:
    """Installed and shipped profiles as plain data, in the order in which policies look, and those that cannot be read."""
    from winnowkv.calibrate.card import facts
    from winnowkv.models.calibration import installed_files, read_profile, shipped_files

    rows: list[dict[str, Any]] = []
    damaged: list[dict[str, str]] = []
    for path in (*installed_files(), *shipped_files()):
        try:
            rows.append({"file": path.stem, "path": str(path), "installed": is_installed(path), **facts(read_profile(path))})
        except WinnowError as error:
            damaged.append({"path": str(path), "error": str(error)})
    return rows, damaged


def named_files(name: str) -> list[tuple[Path, str]]:
    """The files of found profiles that a name may mean, with their model's name: a path, a file's name, or a model's."""
    rows, damaged = found_profiles()
    every = [(Path(row["path"]), row["model"]) for row in rows] + [(Path(one["path"]), "") for one in damaged]
    exact = [one for one in every if name in (str(one[0]), one[0].name, one[0].stem)]
    return exact or [one for one in every if one[1] == name]


def is_installed(path: Path) -> bool:
    """Whether a file lies in the user's folder."""
    from winnowkv.models.calibration import profile_folder

    return path.parent == profile_folder()


def text(value: Any) -> str:
    """A fact in a cell of a table; profiles of others may hold anything there."""
    return "-" if value is None else printable(str(value))[:20]


def register(app: typer.Typer) -> None:
    """Add the commands."""
    group = typer.Typer(no_args_is_help=True, help="Calibration profiles: installed, fetched from the Hub, published there.")
    group.command("list")(list_profiles)
    group.command("show")(show)
    group.command("fetch")(fetch)
    group.command("publish")(publish)
    group.command("add")(add)
    group.command("rm")(remove)
    app.add_typer(group, name="profile")
