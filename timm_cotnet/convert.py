"""Official checkpoints to safetensors: `python -m timm_cotnet.convert CHECKPOINT --model cotnet50 --output DIR`.

What is written into the folder is what the Hub repository of the model holds. A folder of checkpoints is converted in
one go.
"""
import argparse
import json
import os
import shutil
import sys
import time
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Dict, List, Optional, Tuple

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from .cards import card_files, plain_card_files
from .checkpoint import CheckpointError, find_state_dict, find_tag, find_variant, is_detection, meta_model
from .checkpoint import published_tags, read_checkpoint, rename_detection, resolve_model
from .digest import sha256
from .hub import WEIGHTS_NAME
from .misfit import first_few
from .published import PUBLISHED
from .verify import add_data_options, verify_all

__all__ = ['Conversion', 'FolderRow', 'convert', 'convert_folder', 'plain_tensor', 'write_folder']

CHECKPOINT_SUFFIXES = ('.tar', '.pth', '.pt', '.pkl', '.bin')
RECORD_NAME = 'conversions.json'
PARTIAL_PREFIX = '.partial-'


@dataclass(frozen=True)
class Conversion:
    """What was made of one checkpoint.

    Attributes:
        name: Variant and tag; the variant alone if the weights are not published ones.
        found_by: How the model was found.
        taken: Which of the checkpoint's weights were taken.
        num_classes: Classes of the model, 0 if there is no classifier.
        digests: sha256 of each file written, by name.
    """
    name: str
    found_by: str
    taken: str
    num_classes: int
    digests: Dict[str, str] = field(default_factory=dict)


def convert(path: Path, output: Path, model: Optional[str] = None, use_ema: bool = True) -> Conversion:
    """Converts one checkpoint; afterwards `output` holds what the Hub repository of the model holds.

    Args:
        path: Checkpoint.
        output: Folder to write to; the files of an earlier conversion in it are replaced.
        model: Name with or without a tag; found by keys and shapes if left out.
        use_ema: Prefer the moving average of the weights where the checkpoint has one.

    Raises:
        CheckpointError: If the checkpoint cannot be converted.
        OSError: If a file cannot be read or written.
    """
    network, conversion = _load(Path(path), model, use_ema)
    return _write(network, conversion, Path(output))


def _load(path: Path, model: Optional[str], use_ema: bool) -> Tuple[torch.nn.Module, Conversion]:
    """Model with the weights of a checkpoint, and what is known of it."""
    said_variant, said_tag = resolve_model(model) if model else (None, None)
    checkpoint = read_checkpoint(path)
    state_dict, taken = find_state_dict(checkpoint, use_ema)
    detection = is_detection(state_dict)
    if detection:
        state_dict = rename_detection(state_dict)
        taken += ', backbone of a detector'
    classifier = state_dict.get('fc.weight')
    num_classes = len(classifier) if classifier is not None and classifier.ndim == 2 else 0 if detection else 1000
    if num_classes == 0:
        taken += ', no classifier'
    variant = find_variant(state_dict, num_classes, said_variant)

    tag, found_by = said_tag, '--model'
    if not model:
        found_by = 'keys and shapes'
    if num_classes == 0:
        tag = 'jd_coco'
    elif num_classes != 1000 or not published_tags(variant):
        tag = None
    elif not model:
        tag, found_by = find_tag(variant, checkpoint, path)

    name = f'{variant}.{tag}' if tag else variant
    network = meta_model(name if name in PUBLISHED else variant, num_classes)
    network.pretrained_cfg['tag'] = tag
    weights = {key: plain_tensor(key, value) for key, value in state_dict.items()}
    try:
        network.load_state_dict(weights, strict=True, assign=True)
    except RuntimeError as e:  # weights that are integers
        raise CheckpointError(f'the weights of {name} cannot be taken: {e}') from e
    return network, Conversion(name, found_by, taken, num_classes)


def plain_tensor(key: str, value: torch.Tensor) -> torch.Tensor:
    """A finite tensor of its own in ordinary memory, in single precision if it is floating point.

    Args:
        key: What it is called in an error.
        value: Tensor of a checkpoint.

    Raises:
        CheckpointError: If it is no dense tensor of finite numbers.
    """
    if not (value.is_meta or value.layout != torch.strided or value.is_quantized or value.is_complex()):
        value = value.detach().to(torch.float32 if value.is_floating_point() else value.dtype)
        if value.isfinite().all():
            return value.clone(memory_format=torch.contiguous_format)
    raise CheckpointError(
        f'{key} does not hold finite numbers of single precision in a dense tensor; the file is damaged or forged')


def _write(network: torch.nn.Module, conversion: Conversion, output: Path) -> Conversion:
    files = card_files(conversion.name) if conversion.name in PUBLISHED else plain_card_files(network, conversion.taken)
    return replace(conversion, digests=write_folder(files, network.state_dict(), output))


def write_folder(files: Dict[str, str], weights: Dict[str, torch.Tensor], output: Path) -> Dict[str, str]:
    """Writes aside, then moves each file into place, the weights last: where they are, the rest is whole too.

    Args:
        files: Texts by file name; `config.json` is one of them.
        weights: Content of `model.safetensors`.
        output: Folder to write to; made if it does not exist.

    Returns:
        sha256 of each file, by name.

    Raises:
        OSError: If a file cannot be written.
    """
    output.mkdir(parents=True, exist_ok=True)
    for left_over in output.glob(f'{PARTIAL_PREFIX}*'):
        shutil.rmtree(left_over)
    with TemporaryDirectory(prefix=PARTIAL_PREFIX, dir=output) as partial:
        for name, text in files.items():
            Path(partial, name).write_bytes(text.encode())
        try:
            save_file(weights, Path(partial, WEIGHTS_NAME), metadata={'format': 'pt'})
        except SafetensorError as e:  # what it raises if the disk is full
            raise OSError(f'{output / WEIGHTS_NAME} could not be written: {e}') from e
        shutil.copymode(Path(partial, 'config.json'), Path(partial, WEIGHTS_NAME))
        digests = {name: _sync_and_digest(Path(partial, name)) for name in [*files, WEIGHTS_NAME]}
        (output / WEIGHTS_NAME).unlink(missing_ok=True)
        for name in digests:
            os.replace(Path(partial, name), output / name)
    return digests


def _sync_and_digest(path: Path) -> str:
    with path.open('r+b') as file:
        os.fsync(file.fileno())
    return sha256(path)


@dataclass(frozen=True)
class FolderRow:
    """What became of one file of a folder.

    Attributes:
        file: Path inside the folder.
        status: `converted`, `done before` or `failed`.
        conversion: What was made of it, unless it failed.
        reason: Why it failed.
    """
    file: str
    status: str
    conversion: Optional[Conversion] = None
    reason: str = ''


def convert_folder(
        folder: Path,
        output: Path,
        models: Optional[Dict[str, str]] = None,
        use_ema: bool = True,
) -> List[FolderRow]:
    """Converts every checkpoint in a folder, each into `output/<variant>.<tag>`, and says on the screen how it goes.

    What was done is recorded in `output`. Called again after an interruption, it goes on where it stopped: what is
    recorded, was made of the same file and still has the same digests, is not done again.

    Args:
        folder: Checkpoints, searched in its subfolders too.
        output: Folder to write to.
        models: Model of a file where its keys and shapes leave a choice, by path inside the folder.
        use_ema: Prefer the moving average of the weights where a checkpoint has one.

    Returns:
        What became of each checkpoint, in the order of their paths. One that cannot be converted is a row, no error.

    Raises:
        CheckpointError: If `models` names a file that is not among the checkpoints.
    """
    folder, output, models = Path(folder), Path(output), models or {}
    paths = sorted(path for path in folder.rglob('*') if path.suffix in CHECKPOINT_SUFFIXES and path.is_file())
    names = [path.relative_to(folder).as_posix() for path in paths]
    unknown = models.keys() - set(names)
    if unknown:
        raise CheckpointError(
            f'--model names {first_few(sorted(unknown))}, not among the checkpoints in {folder}: '
            f'{first_few(names, 20)}')
    record_path = output / RECORD_NAME
    record = _read_record(record_path)
    made: Dict[str, str] = {}
    rows = []
    for index, (file, path) in enumerate(zip(names, paths), 1):
        stat = path.stat()
        source = {'size': stat.st_size, 'mtime_ns': stat.st_mtime_ns, 'model': models.get(file), 'use_ema': use_ema}
        print(f'[{index}/{len(paths)}] {file} ({stat.st_size / 1e6:.1f} MB) ... ', end='', flush=True)
        start = time.perf_counter()
        row = _convert_one(file, path, output, source, record.get(file), made)
        outcome = f'{row.status}: {row.conversion.name if row.conversion else row.reason}'
        print(f'{outcome} ({time.perf_counter() - start:.1f} s)', flush=True)
        rows.append(row)
        if row.conversion is not None:
            made[row.conversion.name] = file
        if row.status == 'converted':
            record[file] = {'source': source, 'conversion': asdict(row.conversion)}
            _write_record(record_path, record)
    return rows


def _convert_one(
        file: str,
        path: Path,
        output: Path,
        source: Dict[str, Any],
        recorded: Optional[Dict[str, Any]],
        made: Dict[str, str],
) -> FolderRow:
    if recorded is not None and recorded['source'] == {**recorded['source'], **_said(source)}:
        conversion = Conversion(**recorded['conversion'])
        written = output / conversion.name
        if conversion.name not in made and all(
                (written / name).is_file() and sha256(written / name) == digest
                for name, digest in conversion.digests.items()):
            return FolderRow(file, 'done before', conversion)
    try:
        network, conversion = _load(path, source['model'], source['use_ema'])
        if conversion.name in made:
            raise CheckpointError(
                f'it is {conversion.name}, as is {made[conversion.name]}: remove one, or pass --model NAME')
        return FolderRow(file, 'converted', _write(network, conversion, output / conversion.name))
    except (CheckpointError, OSError) as e:
        return FolderRow(file, 'failed', reason=str(e).replace('--model ', f'--model {file}='))


def _said(source: Dict[str, Any]) -> Dict[str, Any]:
    """What is known of a file now; a model that is not named again is the one that was."""
    return {key: value for key, value in source.items() if value is not None}


def _read_record(path: Path) -> Dict[str, Any]:
    try:
        record = json.loads(path.read_text())
    except (FileNotFoundError, ValueError):
        record = None
    # without a record, all is done again
    return record if isinstance(record, dict) and all(map(_is_entry, record.values())) else {}


def _is_entry(entry: Any) -> bool:
    return isinstance(entry, dict) and isinstance(entry.get('source'), dict) \
        and isinstance(entry.get('conversion'), dict) and isinstance(entry['conversion'].get('digests'), dict) \
        and entry['conversion'].keys() == {known.name for known in fields(Conversion)}


def _write_record(path: Path, record: Dict[str, Any]) -> None:
    partial = path.with_name(f'{PARTIAL_PREFIX}{path.name}')
    partial.write_text(json.dumps(record, indent=2))
    os.replace(partial, path)


def main(argv: Optional[List[str]] = None) -> int:
    parser = argparse.ArgumentParser(prog='python -m timm_cotnet.convert', description=__doc__.split('\n')[0])
    parser.add_argument('checkpoint', nargs='?', type=Path, help='official checkpoint, or a folder of them')
    parser.add_argument(
        '--model', action='append', default=[],
        help='name with or without a tag, such as cotnet50 (default: found by keys and shapes); for a folder FILE=NAME')
    parser.add_argument('--output', type=Path, help='folder to write to; for a folder, one inside it per model')
    parser.add_argument('--no-ema', action='store_true', help='take state_dict even where there is a state_dict_ema')
    parser.add_argument(
        '--verify', type=Path, metavar='DIR', help='evaluate what was converted into DIR, as timm_cotnet.verify does')
    add_data_options(parser)
    args = parser.parse_args(argv)
    if args.verify is None and (args.checkpoint is None or args.output is None):
        parser.error('CHECKPOINT and --output are needed, or --verify and --data')
    if args.verify is not None and (args.data is None or args.checkpoint is not None):
        parser.error('--verify needs --data, and no CHECKPOINT')
    if args.verify is None and args.data is not None:
        parser.error('--data is for --verify DIR, which evaluates what was converted into DIR')
    try:
        if args.verify is not None:
            return verify_all(args.verify, args.data, args.batch_size, args.workers, args.device)
        return _main_folder(args) if args.checkpoint.is_dir() else _main_file(args)
    except (CheckpointError, OSError, RuntimeError) as e:  # the last from timm, about images or weights
        print(f'error: {e}', file=sys.stderr)
        return 1


def _main_file(args: argparse.Namespace) -> int:
    if len(args.model) > 1:
        raise CheckpointError(f'--model is given {len(args.model)} times for one checkpoint')
    conversion = convert(args.checkpoint, args.output, *args.model, use_ema=not args.no_ema)
    print(f'model   {conversion.name}, found by {conversion.found_by}')
    print(f'taken   {conversion.taken}')
    for name, digest in conversion.digests.items():
        print(f'sha256  {digest}  {args.output / name} ({(args.output / name).stat().st_size} bytes)')
    print(f"use     timm.create_model('local-dir:{args.output}', pretrained=True)")
    return 0


def _main_folder(args: argparse.Namespace) -> int:
    if not all('=' in model for model in args.model):
        raise CheckpointError('--model for a folder is FILE=NAME, once for each file that it concerns')
    rows = convert_folder(
        args.checkpoint, args.output, dict(model.rsplit('=', 1) for model in args.model), use_ema=not args.no_ema)
    width = max((len(row.file) for row in rows), default=4)
    print(f'\n{"file":{width}}  {"status":11}  {"model":26}  {"sha256 of model.safetensors":64}  taken')
    for row in rows:
        made = row.conversion
        print(f'{row.file:{width}}  {row.status:11}  ' + (
            f'{made.name:26}  {made.digests[WEIGHTS_NAME]}  {made.taken}' if made else row.reason.splitlines()[0]))
    names = {row.conversion.name for row in rows if row.conversion}
    for name, facts in PUBLISHED.items():
        if name not in names:
            print(f'not among them: {name}, published at {facts.url}')
    return int(not rows or any(row.status == 'failed' for row in rows))


if __name__ == '__main__':
    sys.exit(main())
