"""Model folders: registration with ComfyUI, the file list of a loader, and checks of the chosen file."""

import os
from dataclasses import dataclass

import folder_paths


@dataclass(frozen=True)
class ModelFolder:
    """The folder models/<kind>, together with the folders that extra_model_paths.yaml lists under the same key.

    kind: the key in folder_paths; content: what a file holds, and advice: how to get one, both for the error that there is
    none; suffixes: of the files to list.
    """

    kind: str
    content: str
    advice: str
    suffixes: frozenset[str] = frozenset({".safetensors"})

    @property
    def placeholder(self) -> str:
        """The only option of a combo while the folder is empty."""
        return f"(no file in models/{self.kind} yet)"

    def register(self) -> None:
        """Adds the folder to ComfyUI's model folders."""
        folder_paths.add_model_folder_path(self.kind, os.path.join(folder_paths.models_dir, self.kind))
        # For a kind that ComfyUI does not know, it would list files of every suffix.
        folder_paths.folder_names_and_paths[self.kind] = (folder_paths.get_folder_paths(self.kind), set(self.suffixes))

    def files(self) -> list[str]:
        """Names of the files in the folder."""
        return folder_paths.get_filename_list(self.kind)

    def options(self) -> list[str]:
        """Options of a combo: the files, or the placeholder."""
        return self.files() or [self.placeholder]

    def path(self, file: str) -> str:
        """The full path. Raises FileNotFoundError."""
        return folder_paths.get_full_path_or_raise(self.kind, file)

    def validate(self, file: str | None) -> bool | str:
        """A loader's validate_inputs: True, or what is wrong. None is the value of a connected input."""
        if file is not None and not isinstance(file, str):
            return f"found {file!r}, expected the name of a file in models/{self.kind}"
        if file is None or folder_paths.get_full_path(self.kind, file) is not None:
            return True
        folder = folder_paths.get_folder_paths(self.kind)[0]
        if file == self.placeholder:
            return f"there is no {self.content} in {folder}: {self.advice}"
        if not self.files():
            return f"there is no '{file}' in {folder}, nor any other {self.content}: {self.advice}"
        return f"there is no '{file}' in {folder}: put it there and refresh, choose another file, or {self.advice}"

    def fingerprint(self, file: str):
        """A loader's fingerprint_inputs: changes when the file does."""
        path = folder_paths.get_full_path(self.kind, file)
        return file if path is None else file_state(path)


def file_state(path: str) -> list[int]:
    """[modification time in ns, size in bytes]."""
    status = os.stat(path)
    return [status.st_mtime_ns, status.st_size]
